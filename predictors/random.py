"""The random predictor: the floor of every table, and the worst case, which must alter no token."""

from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, StepCount

if TYPE_CHECKING:
    from torch import Tensor


class RandomPredictor:
    """Draws top_k experts a layer before each token.

    `confidence` is the probability claimed for each drawn expert; the others share what is left of
    top_k. The default is the true one, top_k / num_experts for every expert, with the draw visible
    only in the order; a high one makes a prefetcher fetch the wrong experts.
    """

    def __init__(
        self, shape: ModelShape, *, seed: int = 0, confidence: float | None = None
    ) -> None:
        uniform = shape.top_k / shape.num_experts
        if confidence is not None and not uniform <= confidence <= 1.0:
            raise ValueError(f"confidence {confidence}: from {uniform} (uniform) to 1 is accepted")
        self.shape = shape
        self._generator = np.random.default_rng(seed)
        self._drawn = uniform if confidence is None else confidence
        num_others = shape.num_experts - shape.top_k
        self._other = shape.top_k * (1.0 - self._drawn) / num_others if num_others else 0.0
        # The drawn experts must rank first even where all are equally likely.
        if confidence is None and num_others:
            self._drawn = min(uniform * (1.0 + 1e-4), 1.0)
        self._steps = StepCount()

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast:
        self._steps.before_token()
        layers, experts = self.shape.num_moe_layers, self.shape.num_experts
        ranks = self._generator.random((layers, experts)).argsort(axis=1)
        drawn = ranks < self.shape.top_k
        probability = np.where(drawn, self._drawn, self._other).astype(np.float32)
        return Forecast(self._steps.step + horizon - 1, 0, layers, probability)

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
