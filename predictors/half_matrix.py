"""A weight matrix as its checkpoint keeps it, in fp16, for products with one row at a time.

Such a product takes as long as its weights take from memory, so half the bytes are half the time.
"""

from __future__ import annotations

import numpy as np
import torch


class HalfMatrix:
    """A matrix [out, in] in fp16; rows float32 [N, in] -> [N, out] float32, sums in float32.

    A single row is rounded to fp16 as well (PyTorch's fp16 gemv, fast from AVX2 on: measured in
    bench/LOG.md); of several, the weights are widened for the call. One thread.
    """

    def __init__(self, weight: np.ndarray | torch.Tensor) -> None:
        self._weight = torch.as_tensor(weight).detach().half().contiguous()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) != 1:
            return rows @ self._weight.float().numpy().T
        product = torch.mv(self._weight, torch.from_numpy(rows[0]).half())
        return product.float().numpy()[None]
