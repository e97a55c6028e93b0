"""The oracle: forecasts what was recorded. For replay only, where it is the upper bound.

Knows the whole sequence because the replay hands it over; a running engine cannot.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, StepCount

if TYPE_CHECKING:
    from torch import Tensor

REACH = 4
"""Layers that an in-pass forecast covers, as the trained predictors do."""

_RANK = 1e-6


class Oracle:
    """Probability 1 for the experts that will be used, 0 for all others; None past the end.

    The used ones differ by a millionth each, so that they rank by router weight. `foresee` must be
    called before `begin`: without it, or past the end of what it was told, the oracle says nothing.
    Whoever does not ask at each step must `follow`, or the steps that went by are spoken of late.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._topk_ids = np.zeros((0, shape.num_moe_layers, shape.top_k), dtype=np.int64)
        self._prompt_tokens = 0
        self._steps = StepCount()
        self._step_now: Callable[[], int] = lambda: self._steps.step

    def follow(self, step_now: Callable[[], int]) -> None:
        """Where the sequence stands from now on: 0 in the prompt, 1 in the first decode step."""
        self._step_now = step_now

    def foresee(self, topk_ids: np.ndarray) -> None:
        """The routing [T, L, k] of the sequence that begins next, its prompt included."""
        self._topk_ids = topk_ids.astype(np.int64)

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._prompt_tokens = len(prompt_ids)
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        self._steps.before_token()
        return self._forecast(self._step_now() + horizon - 1, 0, self.shape.num_moe_layers)

    def in_pass(self, layer_idx: int, router_input: "Tensor") -> Forecast | None:
        self._steps.in_pass()
        layer_to = min(layer_idx + 1 + REACH, self.shape.num_moe_layers)
        if layer_idx + 1 >= layer_to:
            return None
        return self._forecast(self._step_now(), layer_idx + 1, layer_to)

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: "Tensor | None",
    ) -> None:
        self._steps.in_pass()

    def _forecast(self, step: int, layer_from: int, layer_to: int) -> Forecast | None:
        # Step 0 is the whole prompt, each further step one token.
        rows = slice(0, self._prompt_tokens)
        if step:
            rows = slice(self._prompt_tokens + step - 1, self._prompt_tokens + step)
        ids = self._topk_ids[rows, layer_from:layer_to]
        if not ids.size:
            return None
        probability = np.zeros((layer_to - layer_from, self.shape.num_experts), dtype=np.float32)
        certain = 1.0 - _RANK * np.arange(ids.shape[-1], dtype=np.float32)
        for token_ids in ids[::-1]:
            np.put_along_axis(probability, token_ids, certain[None], axis=1)
        return Forecast(step, layer_from, layer_to, probability)
