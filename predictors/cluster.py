"""Clusters of routing: the last tokens' experts belong to one of some groups found by k-means, and
each group has frequencies of its own for what comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .calibration import Calibration
from .checkpoint import take
from .context import ContextFamily, Window, window_of

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal
    from .presets import Settings

NUM_GROUPS = 64
DECAY = 0.5
"""What each token further back counts of the one after it."""

MAX_ROWS = 16_384
NUM_ROUNDS = 12
PRIOR_TOKENS = 8.0
_FLOOR = 1e-4


def k_means(points: np.ndarray, num_groups: int, *, seed: int) -> np.ndarray:
    """Centres [G, D] of `points` [N, D] by Lloyd's rounds from points drawn apart (k-means++).

    A group that loses its points starts anew at the point worst served. Deterministic by seed.
    """
    generator = np.random.default_rng(seed)
    num_groups = min(num_groups, len(points))
    centres = points[generator.integers(len(points))][None]
    squares = (points * points).sum(axis=1)
    nearest = np.full(len(points), np.inf)
    while len(centres) < num_groups:
        distance = squares - 2.0 * points @ centres[-1] + centres[-1] @ centres[-1]
        nearest = np.minimum(nearest, np.maximum(distance, 0.0))
        total = nearest.sum()
        chance = nearest / total if total > 0 else None
        centres = np.vstack([centres, points[generator.choice(len(points), p=chance)]])
    for _ in range(NUM_ROUNDS):
        group, distance = assign(points, centres)
        counts = np.bincount(group, minlength=num_groups)
        sums = np.zeros_like(centres)
        np.add.at(sums, group, points)
        centres = sums / np.maximum(counts, 1)[:, None]
        for empty in np.flatnonzero(counts == 0):
            worst = int(np.argmax(distance))
            centres[empty], distance[worst] = points[worst], -1.0
    return centres.astype(np.float32)


def assign(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point [N] and the squared distance to it [N], up to |point|^2."""
    distance = (centres * centres).sum(axis=1) - 2.0 * points @ centres.T
    group = distance.argmin(axis=1)
    return group, distance[np.arange(len(points)), group] + (points * points).sum(axis=1)


class Cluster(ContextFamily):
    """P(expert | group of the context); `shares` is [horizon, G, L, E]."""

    name = "cluster"

    def __init__(
        self,
        shape: ModelShape,
        *,
        frequencies: np.ndarray,
        context: int,
        centres: np.ndarray,
        shares: np.ndarray,
    ) -> None:
        super().__init__(shape, frequencies=frequencies, context=context, horizon=len(shares))
        self._centres = centres
        self._shares = shares

    @classmethod
    def fit(
        cls, examples: Examples, *, validation: Examples, settings: Settings, progress: Journal
    ) -> Self:
        shape = examples.shape
        rows = examples.rows()
        few = rows[:: max(1, len(rows) // MAX_ROWS)]
        progress("grouping", 0, 1)
        points = usage(window_of(examples, few, context=settings.context), shape)
        centres = k_means(points, NUM_GROUPS, seed=settings.seed)
        frequencies = examples.frequencies()
        cells = (len(centres), shape.num_moe_layers * shape.num_experts)
        shares = []
        for horizon in range(1, settings.horizon + 1):
            counts, totals = np.zeros(cells, np.float32), np.zeros(len(centres), np.float32)
            rows = examples.rows(horizon)
            for start in range(0, len(rows), 4096):
                part = rows[start : start + 4096]
                window = window_of(examples, part, context=settings.context)
                group, _ = assign(usage(window, shape), centres)
                np.add.at(counts, (group[:, None], examples.cells(part + horizon - 1)), 1.0)
                totals += np.bincount(group, minlength=len(centres))
            prior = PRIOR_TOKENS * frequencies.ravel()
            shares.append((counts + prior) / (totals[:, None] + PRIOR_TOKENS))
        made = cls(
            shape,
            frequencies=frequencies,
            context=settings.context,
            centres=centres,
            shares=np.stack(shares).reshape(len(shares), len(centres), *frequencies.shape),
        )
        made.calibrate(validation)
        progress("grouping", 1, 1)
        return made

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        group, _ = assign(usage(window, self.shape), self._centres)
        share = np.clip(self._shares[horizon - 1][group], _FLOOR, 1.0 - _FLOOR)
        return np.log(share) - np.log1p(-share)

    @property
    def parameters(self) -> int:
        return self._centres.size + self._shares.size

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert self.frequencies is not None
        tensors = {
            "frequencies": self.frequencies,
            "cluster.centres": self._centres,
            "cluster.shares": self._shares,
        }
        return tensors, {"context": self.context, "calibration": self.calibration.config()}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        layers, experts = shape.num_moe_layers, shape.num_experts
        centres = take(tensors, "cluster.centres", (None, layers * experts))
        made = cls(
            shape,
            frequencies=take(tensors, "frequencies", (layers, experts)),
            context=int(config["context"]),
            centres=centres,
            shares=take(tensors, "cluster.shares", (None, len(centres), layers, experts)),
        )
        made.calibration = Calibration.from_config(config, shape, horizon=made.horizon)
        return made


def usage(window: Window, shape: ModelShape) -> np.ndarray:
    """[N, L * E] float32: which experts the past tokens used, the newest counting most.

    Divided by the weights that are there, so that a short context is no smaller.
    """
    num_rows, context = window.past_ids.shape
    weights = np.where(
        np.arange(context) < window.length[:, None], DECAY ** np.arange(context), 0.0
    ).astype(np.float32)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    layers = np.arange(shape.num_moe_layers)[:, None] * shape.num_experts
    cells = (window.topk_ids + layers).reshape(num_rows, -1)
    used = np.zeros((num_rows, shape.num_routed_experts), np.float32)
    each = np.repeat(weights, shape.num_moe_layers * shape.top_k, axis=1)
    np.add.at(used, (np.arange(num_rows)[:, None], cells), each)
    return used
