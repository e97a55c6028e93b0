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
"""Five are usual; scores that are not numbers end here, and stay not numbers."""


def inclusion_probability(
    scores: np.ndarray, temperature: np.ndarray, *, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability that each score is among the top_k once noise was added; with its log-odds.

    `scores` [..., E]; `temperature`, broadcast over [...], in standard deviations of a row. The
    log-odds are (score - threshold) / temperature; the threshold is what makes a row sum to top_k,
    found by Newton steps of bounded length from between the scores at the edge. Shifting a row
    changes nothing, so router logits serve as well as log-softmax.
    """
    scores = scores.astype(np.float64)
    num_experts = scores.shape[-1]
    if top_k >= num_experts:
        return np.ones_like(scores), np.full_like(scores, 30.0)
    scaled = scores - scores.sum(axis=-1, keepdims=True) / num_experts
    variance = (scaled * scaled).sum(axis=-1, keepdims=True) / num_experts
    scaled /= np.maximum(np.sqrt(variance) * temperature[..., None], 1e-9)
    edge = num_experts - top_k
    threshold = np.partition(scaled, (edge - 1, edge), axis=-1)[..., edge - 1 : edge + 1]
    threshold = threshold.mean(axis=-1, keepdims=True)
    for _ in range(MAX_NEWTON_STEPS):
        log_odds = scaled - threshold
        # The logistic function by way of tanh, which cannot overflow.
        probability = np.tanh(0.5 * log_odds)
        probability += 1.0
        probability *= 0.5
        excess = probability.sum(axis=-1, keepdims=True) - top_k
        if np.abs(excess).max() < MAX_EXCESS:
            break
        slope = (probability - probability * probability).sum(axis=-1, keepdims=True)
        newton = excess / np.maximum(slope, 1e-9)
        threshold = threshold + np.minimum(np.maximum(newton, -2.0), 2.0)
    return probability, log_odds


@dataclass(slots=True)
class _Claim:
    """What was said of the last token at one layer, kept until that layer's choice is known."""

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
        # By layer spoken of, then by distance - 1.
        self._claims: dict[int, dict[int, _Claim]] = {}

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
        probability, log_odds = inclusion_probability(scores, temperature, top_k=self.shape.top_k)
        for index in range(scores.shape[1]):
            claim = _Claim(probability[-1, index], log_odds[-1, index])
            self._claims.setdefault(layer_idx + 1 + index, {})[index] = claim
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
        for index, claim in self._claims.pop(layer_idx, {}).items():
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
            self.temperature[index] *= np.exp(-step)
