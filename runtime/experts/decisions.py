"""Native calls behind `plan` and `foresight`: sums over all experts, many times a token.

Addresses and numbers only. None of it is there without a compiler: numpy does the same then.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np

from .compiled import compiled


class _Forecasts(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), ("is_known", ctypes.c_void_p))


class Decisions:
    """The calls for one model's experts, [layers, experts]; keeps memory for their results."""

    def __init__(self, library: ctypes.CDLL, num_layers: int, num_experts: int) -> None:
        self._library = library
        self._num_layers, self._num_experts = num_layers, num_experts
        self._size = num_layers * num_experts
        self._cells = (ctypes.c_int64 * self._size)()
        self._leads, self._chances = ((ctypes.c_double * self._size)() for _ in range(2))
        self._steps = (_Forecasts * 3)()

    @classmethod
    def of(cls, num_layers: int, num_experts: int) -> "Decisions | None":
        """None where the native library was not built."""
        library = _library()
        return None if library is None else cls(library, num_layers, num_experts)

    def due(
        self,
        table: int,
        slots: int,
        *,
        layers: tuple[int, int],
        ahead: int,
        reads_a_moment: float,
        queued: float,
        price: float,
    ) -> list[tuple[int, float, float]]:
        """As `plan.Planner` has it, for the layers [first, end) of one step: cell, lead, chance.

        `table` and `slots` are the addresses of float32 and int64.
        """
        count = self._library.outrider_due(
            table,
            slots,
            *layers,
            self._num_experts,
            ahead,
            reads_a_moment,
            queued,
            price,
            self._cells,
            self._leads,
            self._chances,
        )
        _check(count)
        return list(
            zip(self._cells[:count], self._leads[:count], self._chances[:count], strict=True)
        )

    def worths(
        self,
        steps: Sequence[tuple[int, int]],
        uses: tuple[np.ndarray, np.ndarray],
        *,
        nearness: np.ndarray,
        split: int,
        discount: float,
    ) -> np.ndarray:
        """As `foresight.ForecastEviction` has it, [layers, experts].

        `steps` are addresses of three steps' forecasts, float32, and of what rows are known, bytes.
        """
        for forecasts, (table, is_known) in zip(self._steps, steps, strict=True):
            forecasts.table, forecasts.is_known = table, is_known
        out = np.empty((self._num_layers, self._num_experts))
        rates, beyond = uses
        self._library.outrider_worths(
            self._steps,
            rates.ctypes.data,
            beyond.ctypes.data,
            nearness.ctypes.data,
            self._num_layers,
            self._num_experts,
            split,
            discount,
            out.ctypes.data,
        )
        return out

    def least(self, worths: np.ndarray, is_member: int, count: int) -> list[int]:
        """Cells of the `count` members of least worth, ascending; `is_member` is the address of
        bytes.
        """
        found = self._library.outrider_least(
            worths.ctypes.data, is_member, self._size, min(count, self._size), self._cells
        )
        _check(found)
        return self._cells[:found]


def _check(count: int) -> None:
    if count < 0:
        raise MemoryError("deciding what to read ahead could not allocate its working memory")


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled("_decisions")
    if library is None:
        return None
    pointer, wide, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.outrider_due.argtypes = [pointer] * 2 + [wide] * 4 + [real] * 3 + [pointer] * 3
    library.outrider_worths.argtypes = [pointer] * 4 + [wide] * 3 + [real, pointer]
    library.outrider_least.argtypes = [pointer] * 2 + [wide] * 2 + [pointer]
    library.outrider_due.restype = library.outrider_least.restype = wide
    library.outrider_worths.restype = None
    return library
