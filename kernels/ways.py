"""Which of the native kernels compute a row: those for a few rows at once, or those for many."""

from enum import IntEnum


class Way(IntEnum):
    """A row's bits depend on the way and on the row alone.

    STREAMED passes over the weights for four rows at a time, TILED expands them for many; BY_COUNT
    is TILED for more than four rows.
    """

    BY_COUNT = 0
    STREAMED = 1
    TILED = 2


def ways(num_rows: int, num_streamed: int | None) -> list[tuple[int, int, Way]]:
    """(first row, how many, way): the first `num_streamed` rows streamed and the others tiled.

    None leaves it to the count.
    """
    if num_streamed is None:
        return [(0, num_rows, Way.BY_COUNT)]
    parts = [
        (0, num_streamed, Way.STREAMED),
        (num_streamed, num_rows - num_streamed, Way.TILED),
    ]
    return [part for part in parts if part[1]]
