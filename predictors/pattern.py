"""Patterns of past routing: at each layer, what followed the heaviest experts of the last two
tokens, backing off to the last token's and to the layer's frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .calibration import Calibration
from .checkpoint import take
from .context import ContextFamily, Window
from .counts import CountTable

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal
    from .presets import Settings

ORDER = 2
BACKOFF_TOKENS = 8.0
"""The shorter pattern weighs as much as this many tokens of the longer one."""

MIN_SEEN = 4
_FLOOR = 1e-4


class Pattern(ContextFamily):
    """An n-gram model of each layer's heaviest expert, n up to `ORDER` tokens back."""

    name = "pattern"

    def __init__(
        self, shape: ModelShape, *, frequencies: np.ndarray, tables: list[list[CountTable]]
    ) -> None:
        super().__init__(shape, frequencies=frequencies, context=ORDER, horizon=len(tables))
        self._tables = tables

    @classmethod
    def fit(
        cls, examples: Examples, *, validation: Examples, settings: Settings, progress: Journal
    ) -> Self:
        shape, tables = examples.shape, []
        heaviest = examples.topk_ids[:, :, 0].astype(np.int64)
        for horizon in range(1, settings.horizon + 1):
            progress("counting", horizon - 1, settings.horizon)
            orders = []
            for order in range(1, ORDER + 1):
                rows = np.flatnonzero(
                    (examples.position >= order) & (examples.remaining >= horizon - 1)
                )
                past = np.stack([heaviest[rows - back] for back in range(1, order + 1)], axis=1)
                orders.append(
                    CountTable.count(
                        _keys(past, shape.num_experts).ravel(),
                        examples.topk_ids[rows + horizon - 1].reshape(-1, shape.top_k),
                        width=shape.num_experts,
                        min_total=MIN_SEEN,
                    )
                )
            tables.append(orders)
        made = cls(shape, frequencies=examples.frequencies(), tables=tables)
        made.calibrate(validation)
        progress("counting", settings.horizon, settings.horizon)
        return made

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        assert self.frequencies is not None
        num_rows, layers, experts = len(window.length), *self.frequencies.shape
        share = np.broadcast_to(self.frequencies, (num_rows, layers, experts))
        for order, table in enumerate(self._tables[horizon - 1], 1):
            keys = _keys(window.topk_ids[:, :order, :, 0], experts)
            # A pattern reaching behind the sample's first token was never seen.
            keys[window.length < order] = -1
            counts, totals = table.lookup(keys.ravel())
            counts = counts.reshape(share.shape)
            share = (counts + BACKOFF_TOKENS * share) / (
                totals.reshape(num_rows, layers, 1) + BACKOFF_TOKENS
            )
        share = np.clip(share, _FLOOR, 1.0 - _FLOOR).astype(np.float32, copy=False)
        return np.log(share) - np.log1p(-share)

    @property
    def parameters(self) -> int:
        return sum(table.cells.size for orders in self._tables for table in orders)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert self.frequencies is not None
        tensors = {"frequencies": self.frequencies}
        for horizon, orders in enumerate(self._tables, 1):
            for order, table in enumerate(orders, 1):
                tensors |= table.state(f"pattern.{horizon}.{order}")
        return tensors, {"horizon": self.horizon, "calibration": self.calibration.config()}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        experts = shape.num_experts
        tables = [
            [
                CountTable.from_state(tensors, f"pattern.{horizon}.{order}", width=experts)
                for order in range(1, ORDER + 1)
            ]
            for horizon in range(1, int(config["horizon"]) + 1)
        ]
        frequencies = take(tensors, "frequencies", (shape.num_moe_layers, experts))
        made = cls(shape, frequencies=frequencies, tables=tables)
        made.calibration = Calibration.from_config(config, shape, horizon=len(tables))
        return made


def _keys(past: np.ndarray, num_experts: int) -> np.ndarray:
    """[N, L] int64 names of the patterns [N, order, L], distinct over layers."""
    layers = past.shape[2]
    keys = np.broadcast_to(np.arange(layers), (len(past), layers))
    for back in range(past.shape[1]):
        keys = keys * num_experts + past[:, back]
    return keys
