"""A weight matrix as its checkpoint keeps it, in fp16, for products with a few rows at a time.

Such a product takes as long as its weights take from memory, so half the bytes are half the time.
"""

from __future__ import annotations

import numpy as np
import torch

FEW_ROWS = 8
"""So many single products take no longer than widening the weights once."""


class HalfMatrix:
    """A matrix [out, in] in fp16; rows float32 [N, in] -> [N, out] float32, sums in float32.

    Up to FEW_ROWS rows are rounded to fp16 as well (PyTorch's fp16 gemv, fast from AVX2 on:
    measured in bench/LOG.md); for more, the weights are widened for the call. All by PyTorch:
    numpy's products have threads of their own, which fight with the engine's for the processors.
    """

    def __init__(self, weight: np.ndarray | torch.Tensor) -> None:
        self.weight = torch.as_tensor(weight).detach().half().contiguous()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(rows))
        if len(rows) > FEW_ROWS:
            return (given @ self.weight.float().T).numpy()
        products = [torch.mv(self.weight, row) for row in given.half()]
        return torch.stack(products).float().numpy()
