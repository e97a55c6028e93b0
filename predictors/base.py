"""What a predictor is and what it answers; the names predictors go by.

Knows no family: each stands in its own module, imported when its name is asked for.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..collect.schema import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    "frequent": "frequent:FrequentPredictor",
    "lookahead": "lookahead:LookaheadPredictor",
    "random": "random:RandomPredictor",
}
"""Command-line name -> "module:Class" inside this package."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Scored experts of consecutive layers at one step; a value, never changed once made.

    `step` counts forward passes of the sequence: 0 is the prefill, 1 the first decode step.
    `probability` is [layer_to - layer_from, num_experts] float32: the calibrated probability that
    the expert is used there, summing to about top_k in each layer (less or more where a forecast
    speaks of a union of tokens).
    """

    step: int
    layer_from: int
    layer_to: int
    probability: np.ndarray

    def check(self, shape: ModelShape) -> None:
        """Raise ValueError unless the forecast is well-formed and fits `shape`."""
        if not 0 <= self.layer_from < self.layer_to <= shape.num_moe_layers:
            raise ValueError(
                f"forecast for layers {self.layer_from} to {self.layer_to} of a model with "
                f"{shape.num_moe_layers} MoE layers"
            )
        expected = (self.layer_to - self.layer_from, shape.num_experts)
        if self.probability.shape != expected or self.probability.dtype != np.float32:
            raise ValueError(
                f"forecast of {self.probability.dtype} {self.probability.shape}; "
                f"expected float32 {expected}"
            )
        # One comparison refuses NaN too.
        if not ((self.probability >= 0.0) & (self.probability <= 1.0)).all():
            raise ValueError("a forecast holds values outside of 0 to 1, or NaN")


class Predictor(Protocol):
    """Forecasts one sequence. Called on the engine thread: must not block, sync or raise.

    Order of calls: `begin`, then `in_pass` and `observe` for each layer of the prefill; then for
    each decode step `before_token` (at least once) and again `in_pass` and `observe` by layer.
    """

    shape: ModelShape

    def begin(self, prompt_ids: np.ndarray) -> None:
        """Forget the sequence before; `prompt_ids` [T] int."""
        ...

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        """All layers of the step that runs `token_id` (horizon 1), or of the one after it (2)."""
        ...

    def in_pass(self, layer_idx: int, router_input: "Tensor") -> Forecast | None:
        """Layers after `layer_idx`, from that layer's router input [T, hidden_size]."""
        ...

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: "Tensor | None",
    ) -> None:
        """What layer `layer_idx` chose: ids and weights, both [T, top_k]."""
        ...


class StepCount:
    """Numbers a sequence's forward passes from the order in which a predictor is called."""

    def __init__(self) -> None:
        self.step = 0
        self._is_pass_begun = True

    def begin(self) -> None:
        """A new sequence: its prefill is step 0."""
        self.step = 0
        self._is_pass_begun = True

    def before_token(self) -> None:
        """The first call after a pass has begun opens the next step; further calls repeat it."""
        if self._is_pass_begun:
            self.step += 1
            self._is_pass_begun = False

    def in_pass(self) -> None:
        """The pass of the current step is under way."""
        self._is_pass_begun = True


def predictor_class(name: str) -> type:
    """The class behind a command-line name, imported now. ValueError lists the known names."""
    if name not in NAMES:
        raise ValueError(f"predictor {name!r} is unknown; known ones: {', '.join(NAMES)}")
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
