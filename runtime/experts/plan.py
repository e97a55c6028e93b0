"""Forecasts as arrays: which experts are worth a read, in the order in which they are to be read.

Numbers and keys only; decides neither when nor whether.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ...collect.schema import ExpertKey, ModelShape
from .cache import ABSENT
from .decisions import Decisions


class Candidate(NamedTuple):
    """A read that would pay if none of the others were made. `lead` is the number of reads that
    there is time for until it is needed, behind those that are queued.
    """

    key: ExpertKey
    step: int
    lead: float
    chance: float


class Planner:
    """Reads for one model's experts. `slots` is their cache's table, kept up to date by that."""

    def __init__(self, shape: ModelShape, slots: np.ndarray) -> None:
        self._shape = shape
        self._keys = [
            ExpertKey(*pair) for pair in np.ndindex(shape.num_moe_layers, shape.num_experts)
        ]
        self._slots, self._slots_address = slots, slots.ctypes.data
        self._native = Decisions.of(shape.num_moe_layers, shape.num_experts)

    def due(
        self,
        tables: Mapping[int, np.ndarray],
        *,
        position: int,
        last: int,
        reads_a_moment: float,
        queued: float,
        price: float,
    ) -> list[Candidate]:
        """What is absent, of `tables` by step, for moments after `position` up to `last`, if half
        of it would be there in time and it pays at that price.

        This token's before the next one's, the likelier (by tenths) and sooner first.
        """
        num_layers, found = self._shape.num_moe_layers, []
        for step in sorted(tables):
            # Of the moments the first that counts, and the one behind the last.
            first = max(0, position + 1 - step * num_layers)
            end = min(num_layers, last + 1 - step * num_layers)
            if first >= end:
                continue
            call = self._due_by_numpy if self._native is None else self._due_natively
            due = call(
                tables[step],
                layers=(first, end),
                ahead=step * num_layers - position - 1,
                reads_a_moment=reads_a_moment,
                queued=queued,
                price=price,
            )
            found += [Candidate(self._keys[cell], step, lead, chance) for cell, lead, chance in due]
        return found

    def _due_natively(
        self, table: np.ndarray, **moment: int | float | tuple[int, int]
    ) -> list[tuple[int, float, float]]:
        assert self._native is not None
        return self._native.due(table.ctypes.data, self._slots_address, **moment)  # type: ignore[arg-type]

    def _due_by_numpy(
        self,
        table: np.ndarray,
        *,
        layers: tuple[int, int],
        ahead: int,
        reads_a_moment: float,
        queued: float,
        price: float,
    ) -> list[tuple[int, float, float]]:
        num_experts = self._shape.num_experts
        leads = np.arange(layers[0] + 1 + ahead, layers[1] + 1 + ahead) * reads_a_moment - queued
        lead = leads.repeat(num_experts)
        share = np.minimum(lead, 1.0)
        start, end = layers[0] * num_experts, layers[1] * num_experts
        tenths = np.rint(table.reshape(-1)[start:end] * np.float32(10.0))
        chance = table.reshape(-1)[start:end].astype(np.float64)
        is_due = (share >= 0.5) & (chance * share > (1.0 - chance) * price)
        cells = np.flatnonzero(is_due & (self._slots.reshape(-1)[start:end] == ABSENT))
        order = cells[np.lexsort((chance[cells], lead[cells], -tenths[cells]))]
        return list(
            zip((order + start).tolist(), lead[order].tolist(), chance[order].tolist(), strict=True)
        )
