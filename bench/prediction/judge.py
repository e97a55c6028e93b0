"""From what was forecast to sums over documents and layers: everything a row is made of.

Applies the metrics window by window, so that whole tables of forecasts never lie in memory.
"""

from dataclasses import dataclass, field

import numpy as np

from ...collect.schema import ModelShape
from ...predictors import metrics
from .misses import BUDGETS

COLUMNS = (
    "count",
    "top1",
    "top2",
    "recall_at_k",
    "recall_at_2k",
    "exact",
    "right",
    "claimed",
    "brier",
)
MISS_COLUMNS = tuple((f"foretold {name}", f"missed {name}") for name in BUDGETS)


@dataclass(frozen=True, slots=True)
class Judged:
    """All that is kept of one predictor, moment and distance, over N decode tokens.

    `document` [N]; `values` [N, L, COLUMNS], zero where nothing was forecast; `is_found` bool
    [N, L, k] of the k highest forecasts; `high` and `is_high_used` [N, L, 2k]: each layer's highest
    forecasts and whether the expert was used.
    """

    document: np.ndarray
    values: np.ndarray
    is_found: np.ndarray
    high: np.ndarray
    is_high_used: np.ndarray

    @property
    def is_forecast(self) -> np.ndarray:
        """bool [N, L]: something was said of this layer of this token."""
        return self.values[..., 0] > 0

    def column(self, name: str) -> np.ndarray:
        """One of COLUMNS, [N, L]."""
        return self.values[..., COLUMNS.index(name)]


@dataclass(slots=True)
class Judge:
    """Collects one kind of forecast over the windows, in order."""

    shape: ModelShape
    _parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, table: np.ndarray | None, topk_ids: np.ndarray, document: int) -> None:
        """Forecasts [T, L, E], NaN or None where nothing was said, and what was used."""
        steps, layers, top_k = topk_ids.shape
        width = min(2 * top_k, self.shape.num_experts)
        if table is None:
            self._parts.append(
                (
                    np.full(steps, document),
                    np.zeros((steps, layers, len(COLUMNS))),
                    np.zeros((steps, layers, top_k), dtype=bool),
                    np.zeros((steps, layers, width), dtype=np.float32),
                    np.zeros((steps, layers, width), dtype=bool),
                )
            )
            return
        is_said = ~np.isnan(table[..., 0])
        probability = np.where(is_said[..., None], table, 0.0)
        ranking = metrics.ranked(probability, width)
        high_k = ranking[..., :top_k]
        is_used = metrics.used(topk_ids, self.shape.num_experts)
        right, claimed = metrics.claims(probability, is_used)
        columns = (
            np.ones(is_said.shape),
            metrics.top1(ranking, topk_ids),
            metrics.top2(ranking, topk_ids),
            metrics.recall(high_k, topk_ids),
            metrics.recall(ranking, topk_ids),
            metrics.exact(ranking, topk_ids),
            right,
            claimed,
            metrics.brier(probability, is_used),
        )
        self._parts.append(
            (
                np.full(steps, document),
                np.stack(columns, axis=-1) * is_said[..., None],
                metrics.found(high_k, topk_ids) & is_said[..., None],
                np.take_along_axis(probability, ranking, axis=-1),
                np.take_along_axis(is_used, ranking, axis=-1),
            )
        )

    def judged(self) -> Judged:
        """Everything added so far."""
        return Judged(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))
