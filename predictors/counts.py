"""A table of how often things happened, by key: one byte a cell, zeros for keys never seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from .checkpoint import take

MAX_CELL = 255


class CountTable:
    """Counts [U, W] of the events of U keys; `keys` [U] int64 ascending, `totals` [U] float32.

    A row is kept in steps of `steps` [U]: exact while no count passes 255, and to a half of a 255th
    of the row's largest beyond. Rare keys, whose counts are noise, are exact.
    """

    def __init__(
        self, keys: np.ndarray, totals: np.ndarray, steps: np.ndarray, cells: np.ndarray
    ) -> None:
        self.keys = keys
        self.totals = totals
        self.steps = steps
        self.cells = cells

    @classmethod
    def count(cls, keys: np.ndarray, events: np.ndarray, *, width: int, min_total: int = 1) -> Self:
        """Count `events` [N, M] (each below `width`) under `keys` [N].

        A key seen fewer than `min_total` times is left out.
        """
        found, inverse, totals = np.unique(keys, return_inverse=True, return_counts=True)
        kept = np.flatnonzero(totals >= min_total)
        cells = np.zeros((len(kept), width), np.uint8)
        steps = np.ones(len(kept), np.float32)
        order = np.argsort(inverse, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(totals)])
        # As many keys at a time as make a working set of a few megabytes.
        chunk = max(1, (1 << 22) // width)
        for first in range(0, len(kept), chunk):
            part = kept[first : first + chunk]
            local = np.concatenate([np.full(totals[key], at) for at, key in enumerate(part)])
            rows = np.concatenate([order[bounds[key] : bounds[key + 1]] for key in part])
            flat = (local[:, None] * width + events[rows]).ravel()
            counts = np.bincount(flat, minlength=len(part) * width).reshape(len(part), width)
            largest = counts.max(axis=1)
            step = np.maximum(largest / MAX_CELL, 1.0)
            steps[first : first + chunk] = step
            cells[first : first + chunk] = np.rint(counts / step[:, None])
        return cls(found[kept].astype(np.int64), totals[kept].astype(np.float32), steps, cells)

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts [N, W] and totals [N] of `keys` [N], float32."""
        if not len(self.keys):
            empty = np.zeros((len(keys), self.cells.shape[1] + 1), np.float32)
            return empty[:, 1:], empty[:, 0]
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        is_known = self.keys[at] == keys
        step = np.where(is_known, self.steps[at], np.float32(0.0))
        return self.cells[at] * step[:, None], np.where(is_known, self.totals[at], np.float32(0.0))

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        """Tensors that `from_state` makes the same table of."""
        return {
            f"{prefix}.keys": self.keys,
            f"{prefix}.totals": self.totals,
            f"{prefix}.steps": self.steps,
            f"{prefix}.cells": self.cells,
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, np.ndarray], prefix: str, *, width: int) -> Self:
        """The inverse of `state`. PredictorError names the tensor that does not fit."""
        keys = take(tensors, f"{prefix}.keys", (None,))
        num_keys = len(keys)
        return cls(
            keys,
            take(tensors, f"{prefix}.totals", (num_keys,)),
            take(tensors, f"{prefix}.steps", (num_keys,)),
            take(tensors, f"{prefix}.cells", (num_keys, width)),
        )
