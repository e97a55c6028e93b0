"""Before attention: the state and the experts of layer l, standing in for what enters layer l + 1.

Sees what layer l's router chose and how much each expert weighs, so it is a kind of its own and
never compared with what sees the state alone. The true state is not in traces: each expert's output
is learned as one vector, which is added in proportion to its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .calibration import Calibration
from .checkpoint import take
from .corrected import ranking_scores
from .in_pass import (
    DEPTH,
    InPassPredictor,
    fit_rows,
    gate_logits,
    later_layers,
    refuse_missing,
)
from .stacking import MAX_ROWS, fit_slopes

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal
    from .lookahead import Gate
    from .presets import Settings

RIDGE = 30.0
"""Penalty in rows of unit variance, as `corrected` has it."""


def routed(logits: np.ndarray, bias: np.ndarray | None, *, top_k: int, scoring: str) -> np.ndarray:
    """What a layer's own gate chooses: softmax or sigmoid shares [N, E] of the top_k, else 0."""
    scores = ranking_scores(logits, bias, is_sigmoid=scoring == "sigmoid")
    edge = scores.shape[1] - top_k
    least = np.partition(scores, edge, axis=1)[:, edge : edge + 1]
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return np.where(scores >= least, share, 0.0).astype(np.float32)


class PreAttention:
    """Logits of layer l + d: weight[l, d] @ [state, routed experts' shares] + offset[l, d].

    `weight` [L, DEPTH, E, H + E]; `offset` [L, DEPTH, E]. Ridge regression in closed form.
    """

    name = "pre-attention"
    needs_gates = True
    frequencies: np.ndarray | None = None

    def __init__(
        self,
        shape: ModelShape,
        *,
        weight: np.ndarray,
        offset: np.ndarray,
        calibration: Calibration,
    ) -> None:
        self.shape = shape
        self.hidden_layers = tuple(range(shape.num_moe_layers))
        self.weight, self.offset = weight, offset
        self.calibration = calibration

    @classmethod
    def fit(
        cls,
        examples: Examples,
        *,
        validation: Examples,
        settings: Settings,
        progress: Journal,
    ) -> Self:
        """Least squares for each layer; trust by held-out log loss.

        Raises TrainingDataError without router inputs of all layers, or without gates.
        """
        shape = examples.shape
        layers = range(shape.num_moe_layers)
        for each in (examples, validation):
            refuse_missing(each, layers, cls.name)
        gates = examples.gates or ()
        width = shape.hidden_size + shape.num_experts
        size = (shape.num_moe_layers, DEPTH, shape.num_experts)
        family = cls(
            shape,
            weight=np.zeros((*size, width), np.float32),
            offset=np.zeros(size, np.float32),
            calibration=Calibration.identity(shape, horizon=DEPTH),
        )
        rows, held_out = fit_rows(examples), fit_rows(validation, MAX_ROWS)
        for layer_idx in layers[:-1]:
            progress("fitting before attention", layer_idx, len(layers))
            family._fit_layer(layer_idx, examples, rows, gates)
            family._calibrate(layer_idx, validation, held_out, gates)
        progress("fitting before attention", len(layers), len(layers))
        return family

    def _features(
        self, examples: Examples, rows: np.ndarray, gates: Sequence[Gate], layer_idx: int
    ) -> np.ndarray:
        states = examples.hidden[layer_idx][rows].astype(np.float32)
        logits, bias = gate_logits(gates[layer_idx], states), _bias(gates[layer_idx])
        share = routed(logits, bias, top_k=self.shape.top_k, scoring=examples.scoring)
        return np.concatenate([states, share], axis=1)

    def _fit_layer(
        self, layer_idx: int, examples: Examples, rows: np.ndarray, gates: Sequence[Gate]
    ) -> None:
        features = self._features(examples, rows, gates, layer_idx)
        mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
        scaled = (features - mean) / spread
        covariance = (scaled.T @ scaled).astype(np.float64) + RIDGE * np.eye(scaled.shape[1])
        for place, target in enumerate(later_layers(self.shape, layer_idx)):
            states = examples.hidden[target][rows].astype(np.float32)
            wanted = gate_logits(gates[target], states)
            # A row's level chooses nothing, so it need not be learned.
            wanted -= wanted.mean(axis=1, keepdims=True)
            found = np.linalg.solve(covariance, (scaled.T @ wanted).astype(np.float64)).T
            self.weight[layer_idx, place] = found / spread
            self.offset[layer_idx, place] = wanted.mean(axis=0) - (found / spread) @ mean

    def _calibrate(
        self, layer_idx: int, examples: Examples, rows: np.ndarray, gates: Sequence[Gate]
    ) -> None:
        features = self._features(examples, rows, gates, layer_idx)
        targets = later_layers(self.shape, layer_idx)
        used = examples.membership(rows)
        scores = self.scores(layer_idx, features, gates, scoring=examples.scoring)
        for place, target in enumerate(targets):
            slopes = fit_slopes([scores[:, place]], used[:, target], top_k=self.shape.top_k)
            self.calibration.scale[place, target] = slopes[0]

    def scores(
        self, layer_idx: int, features: np.ndarray, gates: Sequence[Gate], *, scoring: str
    ) -> np.ndarray:
        """[N, D, E] that the later routers are expected to rank by, of features [N, H + E]."""
        targets = later_layers(self.shape, layer_idx)
        weight = self.weight[layer_idx, : len(targets)]
        logits = (features @ weight.reshape(-1, weight.shape[-1]).T).reshape(
            len(features), len(targets), -1
        )
        logits += self.offset[layer_idx, : len(targets)]
        biases = [_bias(gates[target]) for target in targets]
        bias = None if any(one is None for one in biases) else np.stack(biases)  # type: ignore[arg-type]
        return ranking_scores(logits, bias, is_sigmoid=scoring == "sigmoid")

    def make(
        self,
        gates: Sequence[Gate] | None = None,
        *,
        scoring: str = "softmax",
        tokens: str = "all",
    ) -> BeforeAttention:
        """A predictor for one sequence. ValueError without the model's gates."""
        if gates is None:
            raise ValueError(f"{self.name} needs the model's gates")
        return BeforeAttention(self, gates, scoring=scoring, tokens=tokens)

    def state(self) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        """See TrainedFamily."""
        tensors = {"weight": self.weight, "offset": self.offset}
        return tensors, {"calibration": self.calibration.config()}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        """See TrainedFamily."""
        size = (shape.num_moe_layers, DEPTH, shape.num_experts)
        return cls(
            shape,
            weight=take(tensors, "weight", (*size, shape.hidden_size + shape.num_experts)),
            offset=take(tensors, "offset", size),
            calibration=Calibration.from_config(config, shape, horizon=DEPTH),
        )


class BeforeAttention(InPassPredictor):
    """Forecasts from layer l once it is known what layer l chose, which its own gate tells."""

    def __init__(
        self, family: PreAttention, gates: Sequence[Gate], *, scoring: str, tokens: str
    ) -> None:
        super().__init__(family.shape, tokens=tokens)
        self._family = family
        self._gates = gates
        self._scoring = scoring
        self._own = [(gate[0].float().cpu().numpy().T, _bias(gate)) for gate in gates]

    def log_odds(self, layer_idx: int, states: np.ndarray) -> np.ndarray:
        weight, bias = self._own[layer_idx]
        share = routed(states @ weight, bias, top_k=self.shape.top_k, scoring=self._scoring)
        features = np.concatenate([states, share], axis=1)
        scores = self._family.scores(layer_idx, features, self._gates, scoring=self._scoring)
        targets = later_layers(self.shape, layer_idx)
        places = np.arange(len(targets))
        return scores * self._family.calibration.scale[places, targets.start + places][:, None]


def _bias(gate: Gate) -> np.ndarray | None:
    return None if gate[1] is None else gate[1].float().cpu().numpy()
