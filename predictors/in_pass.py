"""What the families that forecast in the pass share: states to the host, probabilities in time.

Knows no family. A call has a tenth of a millisecond, so everything here is a few numpy operations
on arrays of depth x experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, StepCount

if TYPE_CHECKING:
    from torch import Tensor

    from .examples import Examples
    from .lookahead import Gate

DEPTH = 4
"""Layers that a forecast in the pass looks ahead."""

NEWTON_STEPS = 3
MAX_NEWTON = 2.0
MAX_FIT_ROWS = 120_000


def later_layers(shape: ModelShape, layer_idx: int, depth: int = DEPTH) -> range:
    """The layers that a forecast from `layer_idx` covers, cut at the last one; may be empty."""
    return range(layer_idx + 1, min(layer_idx + 1 + depth, shape.num_moe_layers))


def to_host(router_input: Tensor, *, last_only: bool) -> np.ndarray:
    """Router inputs as float32 [T or 1, hidden_size] on the host; waits for a device."""
    rows = router_input[-1:] if last_only and len(router_input) > 1 else router_input
    return rows.detach().float().cpu().numpy()


def quick_inclusion(log_odds: np.ndarray, top_k: int) -> np.ndarray:
    """Probabilities [..., E] float32 that sum to top_k within about 1 %.

    As `calibration.inclusion`, but a fixed number of Newton steps from between the scores at the
    edge.
    """
    num_experts = log_odds.shape[-1]
    if top_k >= num_experts:
        return np.ones(log_odds.shape, np.float32)
    edge = num_experts - top_k
    around = np.partition(log_odds, (edge - 1, edge), axis=-1)[..., edge - 1 : edge + 1]
    half = 0.5 * (log_odds - around.mean(axis=-1, keepdims=True))
    surplus = num_experts - 2.0 * top_k
    for _ in range(NEWTON_STEPS):
        # tanh(x / 2) = 2 sigmoid(x) - 1 cannot overflow.
        signed = np.tanh(half)
        slope = num_experts - np.einsum("...e,...e->...", signed, signed)
        newton = (signed.sum(axis=-1) + surplus) / np.maximum(slope, 1e-6)
        half -= np.minimum(np.maximum(newton, -MAX_NEWTON), MAX_NEWTON)[..., None]
    probability = np.tanh(half)
    probability += 1.0
    probability *= 0.5
    return probability.astype(np.float32, copy=False)


def union(probability: np.ndarray) -> np.ndarray:
    """[T, D, E] of single tokens -> [D, E] that any of them uses the expert."""
    if len(probability) == 1:
        return probability[0]
    return 1.0 - (1.0 - probability).prod(axis=0)


def gate_logits(gate: Gate, states: np.ndarray) -> np.ndarray:
    """Router logits [N, E] float32 of router inputs [N, H], the bias of "softmax" routers left
    out.
    """
    return states @ gate[0].float().cpu().numpy().T


def fit_rows(examples: Examples, limit: int = MAX_FIT_ROWS) -> np.ndarray:
    """Rows [N] spread evenly over all tokens, at most `limit`."""
    return np.arange(0, len(examples), max(1, -(-len(examples) // limit)))


def refuse_missing(examples: Examples, layers: Sequence[int], family: str) -> None:
    """TrainingDataError where router inputs or gates are not there to learn from."""
    from .errors import TrainingDataError

    missing = sorted(set(layers) - set(examples.hidden))
    if missing:
        raise TrainingDataError(
            f"{family} learns from the router inputs of all MoE layers, and those of "
            f"{', '.join(map(str, missing))} were not recorded or read; collect with "
            "--hidden-states all"
        )
    if examples.gates is None:
        raise TrainingDataError(
            f"{family} starts from the model's gates, which these traces do not hold (the "
            "routers are not plain ones)"
        )


class InPassPredictor:
    """A predictor that speaks in the pass only. A subclass gives `log_odds`.

    `tokens`: "last" forecasts the step's last token; "all" the union over the step's tokens.
    """

    def __init__(self, shape: ModelShape, *, tokens: str = "all") -> None:
        self.shape = shape
        self._last_only = tokens == "last"
        self._steps = StepCount()

    def log_odds(self, layer_idx: int, states: np.ndarray) -> np.ndarray:
        """[T, D, E] float32 of the D later layers, from states [T, hidden_size]; D is not 0."""
        raise AssertionError("a subclass answers")

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        self._steps.before_token()
        return None

    def in_pass(self, layer_idx: int, router_input: Tensor) -> Forecast | None:
        self._steps.in_pass()
        if layer_idx + 1 >= self.shape.num_moe_layers:
            return None
        states = to_host(router_input, last_only=self._last_only)
        table = union(quick_inclusion(self.log_odds(layer_idx, states), self.shape.top_k))
        return Forecast(self._steps.step, layer_idx + 1, layer_idx + 1 + len(table), table)

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        self._steps.in_pass()
