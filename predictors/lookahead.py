"""Lookahead: the next layers' own gates, applied to this layer's router input.

Needs no training: the gates come from the model, and how much their scores can be trusted at each
distance is learned while it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..collect.schema import ModelShape
from .base import Forecast, StepCount

Gate = tuple[torch.Tensor, torch.Tensor | None]

FIRST_TEMPERATURE = 0.3
"""Temperature at distance 1 before anything was observed, in standard deviations of a score row;
it starts out growing with the square root of the distance."""

LEARNING_RATE = 0.05
MAX_STEP = 0.2

MAX_EXCESS = 0.01
MAX_NEWTON_STEPS = 60
"""Bisection alone needs fewer; scores that are not numbers end here, and stay not numbers."""


def inclusion_probability(
    scores: np.ndarray, temperature: np.ndarray, *, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability that each score is among the top_k once noise was added; with its log-odds.

    `scores` [..., E] and `temperature` [...] in units of a row's standard deviation. The log-odds
    are (score - threshold) / temperature; the threshold is what makes a row sum to top_k, found
    by Newton steps inside a bracket. Shifting a row changes nothing, so router logits serve as
    well as log-softmax.
    """
    scores = scores.astype(np.float64)
    num_experts = scores.shape[-1]
    if top_k >= num_experts:
        return np.ones_like(scores), np.full_like(scores, 30.0)
    spread = np.maximum(scores.std(axis=-1), 1e-6)[..., None]
    scaled = (scores - scores.mean(axis=-1, keepdims=True)) / (spread * temperature[..., None])
    edge = np.partition(scaled, (num_experts - top_k - 1, num_experts - top_k), axis=-1)
    threshold = edge[..., num_experts - top_k - 1 : num_experts - top_k + 1].mean(-1, keepdims=True)
    # At 30 above the largest score all probabilities vanish, at 30 below the smallest all are 1.
    low = scaled.min(axis=-1, keepdims=True) - 30.0
    high = scaled.max(axis=-1, keepdims=True) + 30.0
    for _ in range(MAX_NEWTON_STEPS):
        log_odds = scaled - threshold
        # The logistic function by way of tanh, which cannot overflow.
        probability = np.tanh(0.5 * log_odds)
        probability += 1.0
        probability *= 0.5
        excess = probability.sum(axis=-1, keepdims=True) - top_k
        if np.abs(excess).max() < MAX_EXCESS:
            break
        low = np.where(excess > 0, threshold, low)
        high = np.where(excess > 0, high, threshold)
        slope = (probability - probability * probability).sum(axis=-1, keepdims=True)
        newton = threshold + excess / np.maximum(slope, 1e-12)
        inside = (low < newton) & (newton < high)
        threshold = np.where(inside, newton, (low + high) / 2.0)
    return probability, log_odds


@dataclass(slots=True)
class _Claim:
    """What was said of the last token at one layer, kept until that layer's choice is known."""

    distance: int
    probability: np.ndarray
    log_odds: np.ndarray


class LookaheadPredictor:
    """Forecasts layers l+1 to l+depth from layer l's router input.

    `gates` holds weight [E, H] and bias [E] or None of each MoE layer, on the router's device.
    `scoring` says what the router ranks by: "softmax" ranks by logits (a bias is added to them),
    "sigmoid" by the sigmoid of the logits plus the bias (DeepSeek-V3's selection bias).
    `tokens`: "last" forecasts the step's last token; "all" the union over the step's tokens, which
    then sums to more than top_k. Temperatures follow the observed choices by natural-gradient
    steps on the log loss, one temperature a distance.
    """

    def __init__(
        self,
        shape: ModelShape,
        gates: Sequence[Gate],
        *,
        depth: int = 2,
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        tokens: Literal["last", "all"] = "all",
    ) -> None:
        if len(gates) != shape.num_moe_layers:
            raise ValueError(f"{len(gates)} gates for {shape.num_moe_layers} MoE layers")
        for layer_idx, (weight, _) in enumerate(gates):
            if tuple(weight.shape) != (shape.num_experts, shape.hidden_size):
                raise ValueError(
                    f"gate of MoE layer {layer_idx} is {tuple(weight.shape)}; expected "
                    f"{(shape.num_experts, shape.hidden_size)}"
                )
        if depth < 1 or scoring not in ("softmax", "sigmoid") or tokens not in ("last", "all"):
            raise ValueError(
                f"depth {depth}, scoring {scoring!r}, tokens {tokens!r}: depth is at least 1, "
                "scoring softmax or sigmoid, tokens last or all"
            )
        self.shape = shape
        self.temperature = FIRST_TEMPERATURE * np.sqrt(np.arange(1, depth + 1))
        self._gates = gates
        self._depth = depth
        self._scoring = scoring
        self._tokens = tokens
        self._steps = StepCount()
        self._claims: dict[int, list[_Claim]] = {}

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._steps.begin()
        self._claims.clear()

    def before_token(self, token_id: int, horizon: int) -> None:
        self._steps.before_token()

    @torch.inference_mode()
    def scores(self, layer_idx: int, router_input: torch.Tensor) -> torch.Tensor | None:
        """[T or 1, depth, E] float32 ranking scores of the later layers, on the input's device.

        Depth is cut at the last layer, and None there. Starts device work and does not wait.
        """
        last = min(layer_idx + self._depth, self.shape.num_moe_layers - 1)
        if last <= layer_idx:
            return None
        if self._tokens == "last":
            router_input = router_input[-1:]
        rows = []
        for weight, bias in self._gates[layer_idx + 1 : last + 1]:
            hidden_states = router_input.to(weight.dtype)
            if self._scoring == "softmax":
                rows.append(F.linear(hidden_states, weight, bias).float())
            else:
                score = F.linear(hidden_states, weight).float().sigmoid()
                rows.append(score if bias is None else score + bias.float())
        return torch.stack(rows, dim=1)

    def forecast(self, layer_idx: int, scores: np.ndarray) -> Forecast:
        """Turn `scores` of that layer, brought to the host, into probabilities."""
        temperature = self.temperature[: scores.shape[1]]
        probability, log_odds = inclusion_probability(
            scores, np.broadcast_to(temperature, scores.shape[:2]), top_k=self.shape.top_k
        )
        for index in range(scores.shape[1]):
            claim = _Claim(index, probability[-1, index], log_odds[-1, index])
            self._claims.setdefault(layer_idx + 1 + index, []).append(claim)
        union = probability[0] if len(probability) == 1 else 1.0 - (1.0 - probability).prod(axis=0)
        layer_to = layer_idx + 1 + scores.shape[1]
        return Forecast(self._steps.step, layer_idx + 1, layer_to, union.astype(np.float32))

    def in_pass(self, layer_idx: int, router_input: torch.Tensor) -> Forecast | None:
        self._steps.in_pass()
        scores = self.scores(layer_idx, router_input)
        return None if scores is None else self.forecast(layer_idx, scores.cpu().numpy())

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: torch.Tensor | None,
    ) -> None:
        self._steps.in_pass()
        for claim in self._claims.pop(layer_idx, ()):
            chosen = np.zeros(self.shape.num_experts)
            chosen[topk_ids[-1]] = 1.0
            uncertain = claim.probability * (1.0 - claim.probability)
            mass = uncertain.sum()
            # False for claims that are not numbers, too.
            if not mass > 1e-6:
                continue
            log_odds = np.clip(claim.log_odds, -60.0, 60.0)
            centred = log_odds - (uncertain * log_odds).sum() / mass
            gradient = ((chosen - claim.probability) * centred).sum()
            information = (uncertain * centred**2).sum() + 1e-3
            step = np.clip(LEARNING_RATE * gradient / information, -MAX_STEP, MAX_STEP)
            # Higher log-odds of what was chosen than claimed: the scores deserve more trust.
            self.temperature[claim.distance] *= np.exp(-step)
