"""The most frequent experts of each layer: counted while it runs, or in advance from traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, StepCount
from .calibration import Calibration
from .checkpoint import take
from .context import ContextFamily, Window

if TYPE_CHECKING:
    from torch import Tensor

    from .examples import Examples
    from .journal import Journal
    from .presets import Settings

PRIOR_TOKENS = 8.0
"""The uniform prior weighs as much as this many tokens."""


class FrequentPredictor:
    """Share of the tokens so far that used each expert, with a uniform prior.

    Counts outlive a sequence: usage belongs to the model and the domain. An observation of any
    number of tokens counts each of them.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._counts = np.zeros((shape.num_moe_layers, shape.num_experts))
        self._tokens = np.zeros((shape.num_moe_layers, 1))
        self._steps = StepCount()

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast:
        self._steps.before_token()
        uniform = self.shape.top_k / self.shape.num_experts
        probability = (self._counts + PRIOR_TOKENS * uniform) / (self._tokens + PRIOR_TOKENS)
        step = self._steps.step + horizon - 1
        return Forecast(step, 0, self.shape.num_moe_layers, probability.astype(np.float32))

    def in_pass(self, layer_idx: int, router_input: Tensor) -> None:
        self._steps.in_pass()

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        self._steps.in_pass()
        self._counts[layer_idx] += np.bincount(topk_ids.ravel(), minlength=self.shape.num_experts)
        self._tokens[layer_idx] += len(topk_ids)


class Frequent(ContextFamily):
    """The shares of the training tokens that used each expert, whatever the context."""

    name = "frequent"

    @classmethod
    def fit(
        cls, examples: Examples, *, validation: Examples, settings: Settings, progress: Journal
    ) -> Self:
        made = cls(
            examples.shape,
            frequencies=examples.frequencies(),
            context=1,
            horizon=settings.horizon,
        )
        made.calibrate(validation)
        return made

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        assert self.frequencies is not None
        share = np.clip(self.frequencies, 1e-4, 1.0 - 1e-4)
        return np.repeat((np.log(share) - np.log1p(-share))[None], len(window.length), axis=0)

    @property
    def parameters(self) -> int:
        return self.shape.num_routed_experts

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert self.frequencies is not None
        config = {"horizon": self.horizon, "calibration": self.calibration.config()}
        return {"frequencies": self.frequencies}, config

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        horizon = int(config["horizon"])
        frequencies = take(tensors, "frequencies", (shape.num_moe_layers, shape.num_experts))
        made = cls(shape, frequencies=frequencies, context=1, horizon=horizon)
        made.calibration = Calibration.from_config(config, shape, horizon=horizon)
        return made
