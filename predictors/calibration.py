"""Scores into probabilities that mean what they say: they sum to top_k and come true as often.

Pure functions of arrays and the small fitted state; knows no family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .errors import PredictorError

MAX_EXCESS = 1e-3
MAX_NEWTON_STEPS = 40
"""Three to six are usual; scores that are not numbers end here, and stay not numbers."""

MAX_LOG_ODDS = 30.0
_SEARCH_STEPS = 12
_GOLDEN = (5**0.5 - 1) / 2


def inclusion(log_odds: np.ndarray, top_k: int) -> np.ndarray:
    """Probabilities [..., E] float32 that sum to top_k along the last axis.

    Each row of `log_odds` is shifted by the one amount for which its logistic values sum to
    top_k: the maximum-entropy inclusion probabilities of a set of that size under those weights,
    without the set's own correlations. Newton steps of bounded length from a start between the
    scores at the edge.
    """
    num_experts = log_odds.shape[-1]
    if top_k >= num_experts:
        return np.ones(log_odds.shape, np.float32)
    # Clipped around the edge, where alone a difference is seen.
    edge = num_experts - top_k
    threshold = np.partition(log_odds, (edge - 1, edge), axis=-1)[..., edge - 1 : edge + 1]
    shifted = log_odds - threshold.mean(axis=-1, keepdims=True)
    np.clip(shifted, -MAX_LOG_ODDS, MAX_LOG_ODDS, out=shifted)
    shift = np.zeros((*log_odds.shape[:-1], 1), log_odds.dtype)
    probability = shifted
    for _ in range(MAX_NEWTON_STEPS):
        # The logistic function by way of tanh, which cannot overflow.
        probability = np.tanh(0.5 * (shifted - shift))
        probability += 1.0
        probability *= 0.5
        excess = probability.sum(axis=-1, keepdims=True) - top_k
        if np.abs(excess).max() < MAX_EXCESS:
            break
        slope = (probability - probability * probability).sum(axis=-1, keepdims=True)
        shift += np.clip(excess / np.maximum(slope, 1e-6), -2.0, 2.0)
    return np.clip(probability, 0.0, 1.0).astype(np.float32, copy=False)


def log_loss(probability: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean natural log loss of each expert's use, by layer: [N, L, E] -> [L]."""
    chance = np.where(used, probability, 1.0 - probability)
    return -np.log(np.maximum(chance, 1e-7)).mean(axis=(0, 2))


class Calibration:
    """One trust factor a layer and horizon, by which log-odds are scaled before `inclusion`.

    `scale` is [horizon, L] float32. Fitted by least log loss on held-out rows.
    """

    def __init__(self, scale: np.ndarray, top_k: int) -> None:
        self.scale = scale
        self._top_k = top_k

    @classmethod
    def identity(cls, shape: ModelShape, *, horizon: int) -> Self:
        """Scores are taken at their word."""
        return cls(np.ones((horizon, shape.num_moe_layers), np.float32), shape.top_k)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shape: ModelShape, *, horizon: int) -> Self:
        """The inverse of `config`. PredictorError where it is misshapen."""
        try:
            scale = np.array(config["calibration"]["scale"], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise PredictorError(f"config.json has no calibration.scale ({error})") from None
        expected = (horizon, shape.num_moe_layers)
        if scale.shape != expected or not np.isfinite(scale).all():
            raise PredictorError(f"calibration.scale is {scale.shape}, expected finite {expected}")
        return cls(scale, shape.top_k)

    def config(self) -> dict[str, Any]:
        """As plain numbers; float32 survives the way through decimal text."""
        return {"scale": self.scale.tolist()}

    def probability(self, log_odds: np.ndarray, horizon: int) -> np.ndarray:
        """Calibrated [N, L, E] float32 of the scores [N, L, E] at that horizon."""
        return inclusion(log_odds * self.scale[horizon - 1][:, None], self._top_k)

    def fit(self, log_odds: np.ndarray, used: np.ndarray, horizon: int) -> None:
        """Choose each layer's scale by golden-section search of its log loss; [N, L, E] both."""
        low = np.full(log_odds.shape[1], np.log(0.05), np.float32)
        high = np.full(log_odds.shape[1], np.log(20.0), np.float32)

        def loss(exponent: np.ndarray) -> np.ndarray:
            scaled = log_odds * np.exp(exponent).astype(np.float32)[:, None]
            return log_loss(inclusion(scaled, self._top_k), used)

        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = loss(left), loss(right)
        for _ in range(_SEARCH_STEPS):
            is_left = at_left < at_right
            low, high = np.where(is_left, low, left), np.where(is_left, right, high)
            new_left, new_right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            # One of the two points is kept; which one differs by layer, so both losses are asked.
            left, right = new_left, new_right
            at_left, at_right = loss(left), loss(right)
        self.scale[horizon - 1] = np.exp((low + high) / 2.0)
