"""The most frequent experts of each layer, counted online: no training, no state on disk."""

from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, StepCount

if TYPE_CHECKING:
    from torch import Tensor

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

    def in_pass(self, layer_idx: int, router_input: "Tensor") -> None:
        self._steps.in_pass()

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: "Tensor | None",
    ) -> None:
        self._steps.in_pass()
        self._counts[layer_idx] += np.bincount(topk_ids.ravel(), minlength=self.shape.num_experts)
        self._tokens[layer_idx] += len(topk_ids)
