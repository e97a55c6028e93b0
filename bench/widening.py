"""Padding of single tensors: the real block in the corner, zeros where real inputs meet added rows,
bounded random values where only zeros come in. Knows neither files nor model families.
"""

from collections.abc import Iterator
from enum import Enum

import numpy as np
import torch
import xxhash

CHUNK_BYTES = 16 << 20
_LEVELS = 128


class Fill(Enum):
    """What goes into the part of a tensor that is added."""

    ZEROS = "zeros"
    RANDOM = "random"
    NORM = "norm"


class Filler:
    """Random values of one tensor, the same for the same seed and name on every machine."""

    def __init__(self, seed: int, name: str) -> None:
        key = xxhash.xxh3_64_intdigest(name.encode(), seed=seed)
        self._random = np.random.Generator(np.random.SFC64(key))

    def values(self, rows: int, columns: int, bound: torch.Tensor) -> torch.Tensor:
        """[rows, columns] in fp32, row i uniform on 256 steps within +-bound[i]."""
        raw = np.frombuffer(self._random.bytes(rows * columns), np.int8).copy()
        steps = torch.from_numpy(raw).view(rows, columns).float()
        return steps * (bound / _LEVELS)[:, None]


def widen_norm(weight: torch.Tensor, size: int, *, ratio: float) -> torch.Tensor:
    """RMS norm weights [H] -> [size] in fp32, over sqrt(ratio); ones over it where it meets zeros.

    With eps over `ratio` too: zeros in the padding lower the mean square by `ratio`, which raises
    the normalised values by its square root.
    """
    widened = torch.ones(size, dtype=torch.float64)
    widened[: weight.shape[0]] = weight.double()
    return (widened / ratio**0.5).float()


def widen_matrix(
    weight: torch.Tensor, shape: tuple[int, ...], *, fill: Fill, filler: Filler
) -> Iterator[torch.Tensor]:
    """A matrix or a bias in its new shape, in chunks of rows and in its own dtype.

    Added columns meet zeros, so with Fill.RANDOM they are random in every row: within the largest
    real weight of that row, so that a quantisation scale per row stays what it was, and in added
    rows within the largest of the tensor. Added rows are zero on the real columns, so that their
    output is zero.
    """
    if weight.dim() == 1:
        widened = weight.new_zeros(shape)
        widened[: weight.shape[0]] = weight
        yield widened
        return
    real_rows, real_columns = weight.shape
    rows, columns = shape
    bound = torch.full((rows,), float(weight.abs().max()))
    bound[:real_rows] = weight.abs().amax(dim=1).float()
    step = max(1, CHUNK_BYTES // (columns * weight.dtype.itemsize))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        chunk = weight.new_zeros(end - start, columns)
        num_real = max(0, min(end, real_rows) - start)
        chunk[:num_real, :real_columns] = weight[start : start + num_real]
        if fill is Fill.RANDOM and columns > real_columns:
            values = filler.values(end - start, columns - real_columns, bound[start:end])
            chunk[:, real_columns:] = values.to(weight.dtype)
        yield chunk
