"""Corrected look-ahead: the later layers' gates on this layer's state, plus what least squares
learned of how that state drifts until it reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .calibration import Calibration
from .checkpoint import take
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
"""Penalty on the correction, in rows of unit variance. Weak against 100,000 rows; it keeps small
traces from overfitting."""

RANKS = (8, 16, 32, 64, 128, 256)
KEPT_SHARE = 0.98
"""The lowest rank is taken that keeps this share of the correction's variance, over all layers."""


class CorrectedLookahead:
    """Logits of layer l + d: gate[l + d] @ x + up[l, d] @ (down[l] @ x) + offset[l, d].

    `down` [L, r, H] is shared by the distances of a layer; `up` [L, DEPTH, E, r]; `offset`
    [L, DEPTH, E]. Reduced-rank ridge regression (A. J. Izenman, 1975) from the router input of
    layer l to the logits of the later ones.
    """

    name = "lookahead-corrected"
    needs_gates = True
    frequencies: np.ndarray | None = None

    def __init__(
        self,
        shape: ModelShape,
        *,
        down: np.ndarray,
        up: np.ndarray,
        offset: np.ndarray,
        calibration: Calibration,
    ) -> None:
        self.shape = shape
        self.hidden_layers = tuple(range(shape.num_moe_layers))
        self.down, self.up, self.offset = down, up, offset
        self.calibration = calibration
        self._merged: tuple[Any, list[np.ndarray]] | None = None

    @classmethod
    def fit(
        cls,
        examples: Examples,
        *,
        validation: Examples,
        settings: Settings,
        progress: Journal,
    ) -> Self:
        """Least squares for each layer, in closed form; trust by held-out log loss.

        Raises TrainingDataError without router inputs of all layers, or without gates.
        """
        shape = examples.shape
        layers = range(shape.num_moe_layers)
        for each in (examples, validation):
            refuse_missing(each, layers, cls.name)
        gates = examples.gates or ()
        rows = fit_rows(examples)
        solutions = []
        for layer_idx in layers[:-1]:
            progress("fitting corrections", layer_idx, len(layers))
            solutions.append(_Solution.of(examples, rows, gates, layer_idx))
        held_out = fit_rows(validation, MAX_ROWS)
        made = cls._of_rank(shape, solutions, _rank(solutions, shape))
        made.calibrate(validation, held_out, gates)
        progress("fitting corrections", len(layers), len(layers))
        progress.record(family=cls.name, rank=made.down.shape[1])
        return made

    @classmethod
    def _of_rank(cls, shape: ModelShape, solutions: Sequence[_Solution], rank: int) -> Self:
        layers, experts = shape.num_moe_layers, shape.num_experts
        down = np.zeros((layers, rank, shape.hidden_size), np.float32)
        up = np.zeros((layers, DEPTH, experts, rank), np.float32)
        offset = np.zeros((layers, DEPTH, experts), np.float32)
        for layer_idx, solution in enumerate(solutions):
            low_up, low_down = solution.factors(rank)
            depth = len(low_up) // experts
            down[layer_idx, : len(low_down)] = low_down
            up[layer_idx, :depth, :, : low_up.shape[1]] = low_up.reshape(depth, experts, -1)
            offset[layer_idx, :depth] = solution.offset.reshape(depth, experts)
        calibration = Calibration.identity(shape, horizon=DEPTH)
        return cls(shape, down=down, up=up, offset=offset, calibration=calibration)

    def calibrate(self, examples: Examples, rows: np.ndarray, gates: Sequence[Gate]) -> None:
        """Choose each (distance, layer)'s trust by the log loss of `rows`."""
        maps = self.maps(gates)
        used = examples.membership(rows)
        for layer_idx in range(self.shape.num_moe_layers - 1):
            scores = _scores(self, maps, examples, rows, layer_idx, gates)
            for place, target in enumerate(later_layers(self.shape, layer_idx)):
                slopes = fit_slopes([scores[:, place]], used[:, target], top_k=self.shape.top_k)
                self.calibration.scale[place, target] = slopes[0]

    def maps(self, gates: Sequence[Gate]) -> list[np.ndarray]:
        """For each layer but the last the whole linear map [D, E, H], gates and corrections."""
        if self._merged is None or self._merged[0] is not gates:
            weights = [weight.float().cpu().numpy() for weight, _ in gates]
            merged = []
            for layer_idx in range(self.shape.num_moe_layers - 1):
                targets = later_layers(self.shape, layer_idx)
                low_rank = self.up[layer_idx, : len(targets)] @ self.down[layer_idx]
                merged.append(np.stack([weights[target] for target in targets]) + low_rank)
            self._merged = (gates, merged)
        return self._merged[1]

    def make(
        self,
        gates: Sequence[Gate] | None = None,
        *,
        scoring: str = "softmax",
        tokens: str = "all",
    ) -> Corrected:
        """A predictor for one sequence. ValueError without the model's gates."""
        if gates is None:
            raise ValueError(f"{self.name} needs the model's gates")
        return Corrected(self, gates, scoring=scoring, tokens=tokens)

    def state(self) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        """See TrainedFamily."""
        tensors = {"down": self.down, "up": self.up, "offset": self.offset}
        return tensors, {"calibration": self.calibration.config()}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        """See TrainedFamily."""
        layers, experts = shape.num_moe_layers, shape.num_experts
        down = take(tensors, "down", (layers, None, shape.hidden_size))
        return cls(
            shape,
            down=down,
            up=take(tensors, "up", (layers, DEPTH, experts, down.shape[1])),
            offset=take(tensors, "offset", (layers, DEPTH, experts)),
            calibration=Calibration.from_config(config, shape, horizon=DEPTH),
        )


class Corrected(InPassPredictor):
    """Forecasts layers l + 1 to l + DEPTH of one sequence."""

    def __init__(
        self,
        family: CorrectedLookahead,
        gates: Sequence[Gate],
        *,
        scoring: str,
        tokens: str,
    ) -> None:
        super().__init__(family.shape, tokens=tokens)
        self._is_sigmoid = scoring == "sigmoid"
        self._stages = []
        for layer_idx, whole in enumerate(family.maps(gates)):
            targets = later_layers(family.shape, layer_idx)
            offset = family.offset[layer_idx, : len(targets)]
            scale = np.array(
                [[family.calibration.scale[t - layer_idx - 1, t]] for t in targets], np.float32
            )
            bias = _biases(gates, targets)
            self._stages.append((whole, offset, scale, bias))

    def log_odds(self, layer_idx: int, states: np.ndarray) -> np.ndarray:
        whole, offset, scale, bias = self._stages[layer_idx]
        depth, experts, size = whole.shape
        logits = (states @ whole.reshape(-1, size).T).reshape(len(states), depth, experts)
        logits += offset
        return ranking_scores(logits, bias, is_sigmoid=self._is_sigmoid) * scale


def _rank(solutions: Sequence[_Solution], shape: ModelShape) -> int:
    full = min(shape.hidden_size, DEPTH * shape.num_experts)
    for rank in RANKS:
        if rank < full and np.mean([one.kept(rank) for one in solutions]) >= KEPT_SHARE:
            return rank
    return full


def ranking_scores(logits: np.ndarray, bias: np.ndarray | None, *, is_sigmoid: bool) -> np.ndarray:
    """What a router ranks by: its logits, or their sigmoid, and its selection bias added."""
    if is_sigmoid:
        # By way of tanh, which cannot overflow.
        logits = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return logits if bias is None else logits + bias


def _biases(gates: Sequence[Gate], targets: Sequence[int]) -> np.ndarray | None:
    biases = [gates[target][1] for target in targets]
    if any(bias is None for bias in biases):
        return None
    return np.stack([bias.float().cpu().numpy() for bias in biases if bias is not None])


def _scores(
    family: CorrectedLookahead,
    maps: Sequence[np.ndarray],
    examples: Examples,
    rows: np.ndarray,
    layer_idx: int,
    gates: Sequence[Gate],
) -> np.ndarray:
    targets = later_layers(family.shape, layer_idx)
    states = examples.hidden[layer_idx][rows].astype(np.float32)
    logits = np.einsum("nh,deh->nde", states, maps[layer_idx], optimize=True)
    logits += family.offset[layer_idx, : len(targets)]
    is_sigmoid = examples.scoring == "sigmoid"
    return ranking_scores(logits, _biases(gates, targets), is_sigmoid=is_sigmoid)


class _Solution:
    """Full-rank correction of one layer [D * E, H], and its factors of any rank."""

    def __init__(self, whole: np.ndarray, offset: np.ndarray, root: np.ndarray) -> None:
        self.offset = offset
        # Directions in which the correction matters most on states as they really are.
        self._left, self._strength, self._right = np.linalg.svd(whole @ root, full_matrices=False)
        self._unroot = np.linalg.inv(root)

    @classmethod
    def of(
        cls, examples: Examples, rows: np.ndarray, gates: Sequence[Gate], layer_idx: int
    ) -> Self:
        states = examples.hidden[layer_idx][rows].astype(np.float32)
        mean = states.mean(axis=0)
        centred = states - mean
        missing = []
        for target in later_layers(examples.shape, layer_idx):
            true = gate_logits(gates[target], examples.hidden[target][rows].astype(np.float32))
            # A row's level chooses nothing, so the correction need not learn it.
            residual = true - gate_logits(gates[target], states)
            missing.append(residual - residual.mean(axis=1, keepdims=True))
        wanted = np.concatenate(missing, axis=1)  # [N, D * E]
        covariance = (centred.T @ centred).astype(np.float64)
        penalty = RIDGE * np.trace(covariance) / len(covariance) / len(rows)
        covariance += penalty * np.eye(len(covariance))
        whole = np.linalg.solve(covariance, (centred.T @ wanted).astype(np.float64)).T
        offset = wanted.mean(axis=0) - whole @ mean
        return cls(whole, offset, np.linalg.cholesky(covariance))

    def kept(self, rank: int) -> float:
        """Share of the correction's variance that a rank keeps."""
        squares = self._strength**2
        return float(squares[:rank].sum() / max(squares.sum(), 1e-12))

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(up [D * E, r], down [r, H]) whose product is the best of that rank."""
        rank = min(rank, len(self._strength))
        up = self._left[:, :rank] * self._strength[:rank]
        return up, self._right[:rank] @ self._unroot
