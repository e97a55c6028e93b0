"""One dense matrix as a call that is made over and over."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from . import native
from .native import DTYPE_IDS
from .ways import ways


class Product:
    """`native.linear` by one matrix that is described once: a token makes dozens of calls.

    Keeps the tensors alive and goes by their addresses, so neither may be replaced or moved.
    """

    def __init__(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], *, fmt: str, bias: Tensor | None
    ) -> None:
        self.address = parts["weight"].data_ptr()
        self._kept = (parts, bias)
        self._matrix = native.matrix_of(parts, shape, fmt=fmt, bias=bias)
        self._pointer = ctypes.byref(self._matrix)
        self._num_outputs, self._num_inputs = shape
        self._call = native.loaded().outrider_linear

    def __call__(self, rows: Tensor, num_rows: int, num_streamed: int | None = None) -> Tensor:
        """[..., K] -> [..., N] in the rows' dtype; `num_rows` of them, contiguous, on the CPU.

        `num_streamed` as for `ways`.
        """
        out = rows.new_empty((*rows.shape[:-1], self._num_outputs))
        size = rows.element_size()
        stride, out_stride = self._num_inputs * size, self._num_outputs * size
        for begin, count, way in ways(num_rows, num_streamed):
            status = self._call(
                self._pointer,
                rows.data_ptr() + begin * stride,
                out.data_ptr() + begin * out_stride,
                count,
                stride,
                DTYPE_IDS[rows.dtype],
                way,
                torch.get_num_threads(),
            )
            native.check_status(status)
        return out
