"""What a predictor is and what it answers; the names predictors go by.

Knows no family: each stands in its own module, imported when its name is asked for.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from ..collect.schema import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

    from .examples import Examples
    from .journal import Journal
    from .presets import Settings

NAMES = {
    "attention": "attention:Attention",
    "cluster": "cluster:Cluster",
    "ensemble": "ensemble:Ensemble",
    "frequent": "frequent:FrequentPredictor",
    "hierarchical": "hierarchical:Hierarchical",
    "lookahead": "lookahead:LookaheadPredictor",
    "lookahead-corrected": "corrected:CorrectedLookahead",
    "oracle": "oracle:Oracle",
    "pattern": "pattern:Pattern",
    "pre-attention": "pre_attention:PreAttention",
    "random": "random:RandomPredictor",
    "statistics": "statistics:Statistics",
}
"""Command-line name -> "module:Class" inside this package.

The class is the predictor itself for the three names of UNTRAINED, a TrainedFamily for the others,
but for `oracle`, which replay alone can make.
"""

UNTRAINED = ("frequent", "lookahead", "random")
REPLAY_ONLY = ("oracle",)

_FAMILIES = {name: where for name, where in NAMES.items() if name not in (*UNTRAINED, *REPLAY_ONLY)}
# Counted in advance rather than while running; the same forecast otherwise.
_FAMILIES["frequent"] = "frequent:Frequent"


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


class PredictorFactory(Protocol):
    """What is shared between the predictors of all sequences: a family's trained state.

    `hidden_layers` are the layers whose router input `observe` and `in_pass` must be handed, ()
    where none is read; `frequencies` [num_moe_layers, num_experts], the share of training tokens
    that used each expert, for a warm start of the cache.
    """

    name: str
    shape: ModelShape
    needs_gates: bool
    hidden_layers: tuple[int, ...]
    frequencies: np.ndarray | None

    def make(
        self,
        gates: "Sequence[tuple[Tensor, Tensor | None]] | None" = None,
        *,
        scoring: str = "softmax",
        tokens: str = "all",
    ) -> Predictor:
        """A predictor for one sequence. `gates`, `scoring`, `tokens`: see LookaheadPredictor."""
        ...


class TrainedFamily(PredictorFactory, Protocol):
    """A factory that is learned from traces and kept in a folder (see `checkpoint`)."""

    @classmethod
    def fit(
        cls,
        examples: "Examples",
        *,
        validation: "Examples",
        settings: "Settings",
        progress: "Journal",
    ) -> Self:
        """Learn from training documents; `validation` holds others, to stop and to calibrate by.

        Blocks for as long as it takes. Raises TrainingDataError where `examples` lack something.
        """
        ...

    def state(self) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        """Tensors and plain settings that `from_state` makes the same factory of, bit for bit."""
        ...

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        """The inverse of `state`. Raises PredictorError naming what is missing or misshapen."""
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
    return _imported(NAMES[name])


def family_class(name: str) -> type[TrainedFamily]:
    """The family behind a name, which `outrider train` can fit. SettingsError lists them."""
    from .errors import SettingsError

    if name not in _FAMILIES:
        known = f"those that are trained: {', '.join(sorted(_FAMILIES))}"
        if name in NAMES:
            raise SettingsError(f"predictor {name!r} is not trained; {known}")
        raise SettingsError(f"predictor {name!r} is unknown; {known}")
    return _imported(_FAMILIES[name])


def _imported(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
