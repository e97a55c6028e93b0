"""Forecasts as arrays: which experts are worth a read, in the order in which they are to be read.

Numbers and keys only; decides neither when nor whether.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...collect.schema import ExpertKey, ModelShape


class Cells:
    """All experts of a model in one row, layer after layer."""

    def __init__(self, shape: ModelShape) -> None:
        self.num_layers, self.num_experts = shape.num_moe_layers, shape.num_experts
        self.keys = [
            ExpertKey(*pair) for pair in np.ndindex(shape.num_moe_layers, shape.num_experts)
        ]


class Plan:
    """Candidates, this token's before the next one's and the likelier (by tenths) and sooner first.

    `steps`, `moments`, `chances` are arrays, `keys` a list, all in that order. `is_open` is False
    for those that were issued or are no longer to be.
    """

    def __init__(
        self,
        tables: Mapping[int, np.ndarray],
        *,
        cells: Cells,
        position: int,
        least: float,
        absent: Callable[[Sequence[ExpertKey]], list[bool]],
    ) -> None:
        """Of `tables` by step what has a chance of `least` after the moment `position` and is
        absent.
        """
        num_layers, num_experts = cells.num_layers, cells.num_experts
        found, chances, steps = [], [], []
        for step, table in tables.items():
            start = max(0, position + 1 - step * num_layers) * num_experts
            row = table.reshape(-1)[start:]
            likely = np.flatnonzero(row >= least)
            chances.append(row[likely])
            likely += start
            found.append(likely)
            steps.append(np.full(len(likely), step))
        cell, chance, step = (np.concatenate(one or [[]]) for one in (found, chances, steps))
        keys = [cells.keys[one] for one in cell.tolist()]
        open_cells = np.flatnonzero(absent(keys))
        cell, chance, step = cell[open_cells], chance[open_cells], step[open_cells]
        moment = step * num_layers + cell // num_experts
        order = np.lexsort((chance, moment, -chance.round(1), step))
        self.steps, self.moments = step[order], moment[order]
        self.chances = chance[order].astype(np.float64)
        self.keys = [keys[one] for one in open_cells[order].tolist()]
        self.is_open = np.ones(len(order), dtype=bool)

    def due(
        self, *, position: int, last: int, reads_a_moment: float, queued: float, price: float
    ) -> list[tuple[int, float]]:
        """Which would pay at that price if none of the others were read: open, up to the moment
        `last`, at least half there in time. Each with the reads that there is time for until then,
        behind those `queued`.
        """
        leads = (self.moments - position) * reads_a_moment - queued
        share = np.minimum(leads, 1.0)
        is_due = self.is_open & (self.moments > position) & (self.moments <= last)
        is_due &= (share >= 0.5) & (self.chances * share > (1.0 - self.chances) * price)
        indices = np.flatnonzero(is_due)
        return list(zip(indices.tolist(), leads[indices].tolist(), strict=True))
