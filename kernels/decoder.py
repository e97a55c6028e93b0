"""Rows of several sequences through the parts of a decoder layer: a native call each.

The first `num_streamed` rows of a pass are computed as single tokens are, the others as prompts are
(`ways`); apart from that a row's bits depend on the row and its sequence's past alone.
Descriptors are made once and go by the addresses of the tensors they keep alive, which must stay
where they are. Knows matrices, keys and values; no model. There is no second implementation here:
where the native library is missing, `is_available` says so and a model's own modules compute.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import native
from .activation import ACTIVATIONS, canonical_activation
from .native import DTYPE_IDS, Matrix
from .product import Product
from .ways import Way, ways
from .weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix [N, K] as parts of `fmt` (`quantization.quantize`), with its bias [N] or None."""

    parts: Mapping[str, Tensor]
    fmt: str
    shape: tuple[int, int]
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """An RMS norm of queries or keys: weight [head_dim], or [heads * head_dim] for all at once."""

    weight: Tensor
    eps: float


class _Attention(ctypes.Structure):
    _fields_ = (
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("output", Matrix),
        ("norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("query_norm_width", ctypes.c_int64),
        ("key_norm_width", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("head_norm_eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("format", ctypes.c_int32),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("activation", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


def is_available() -> bool:
    """Whether the calls of this module can be made."""
    return native.is_available()


def serves(projection: Projection) -> bool:
    """Whether this matrix can be one of a descriptor's."""
    weight = projection.parts["weight"]
    return weight.device.type == "cpu" and native.serves_width(projection.fmt, projection.shape[1])


class RmsNorm:
    """weight * x / rms(x), rounded to `weight`'s dtype before and after the weight, as Llama's."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._call = _library().outrider_rms_norm
        self._arguments = (weight.data_ptr(), eps)
        self._sizes = (weight.shape[0], DTYPE_IDS[weight.dtype])

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] contiguous, in the weight's dtype -> [T, H]."""
        out = torch.empty_like(x)
        status = self._call(
            x.data_ptr(),
            *self._arguments,
            x.shape[0],
            *self._sizes,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        native.check_status(status)
        return out


class Pasts:
    """Whose next rows the rows of a pass are, and where each layer keeps their keys and values.

    `table` [layers, sequences, 6] int64 holds, for a sequence and layer: the addresses of its keys
    and of its values [kv_heads, capacity, head_dim], the capacity, the rows that are there, the
    first row of the pass that is its own, and how many are. They follow each other from row 0 on,
    and there is room for them. The first `num_streamed` have one row each, computed as single
    tokens are.
    """

    def __init__(self, table: np.ndarray, *, num_streamed: int) -> None:
        self._kept = table = np.array(table, dtype=np.int64, order="C")
        table[:, num_streamed:, 4] -= num_streamed  # each part of a pass counts from its own row 0
        self.num_streamed = num_streamed
        self._num_sequences = table.shape[1]
        self._address, self._strides = table.ctypes.data, table.strides

    def part(self, layer_idx: int, way: Way) -> tuple[int, int]:
        """Where that layer's sequences of that way stand, and how many they are."""
        begin = self.num_streamed if way is Way.TILED else 0
        count = self._num_sequences - begin if way is Way.TILED else self.num_streamed
        return self._address + layer_idx * self._strides[0] + begin * self._strides[1], count


class Attention:
    """A layer's attention: norm, projections, rotary, each sequence's past, output, residual.

    `projections` are query, key, value and output. Rotary turns the second half of a head against
    the first. With `window` the last so many tokens are seen. Softmax and sums are fp32; a head's
    bits depend on its inputs and the number of keys alone.
    """

    def __init__(
        self,
        projections: tuple[Projection, Projection, Projection, Projection],
        *,
        norm: Tensor,
        eps: float,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scaling: float,
        window: int | None = None,
        query_norm: HeadNorm | None = None,
        key_norm: HeadNorm | None = None,
    ) -> None:
        self._kept = (projections, norm, query_norm, key_norm)
        query, key, value, output = (described(one) for one in projections)
        self.descriptor = _Attention(
            query=query,
            key=key,
            value=value,
            output=output,
            norm=norm.data_ptr(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window or 0,
            eps=eps,
            scaling=scaling,
            format=DTYPE_IDS[norm.dtype],
        )
        if query_norm is not None and key_norm is not None:
            self.descriptor.query_norm = query_norm.weight.data_ptr()
            self.descriptor.key_norm = key_norm.weight.data_ptr()
            self.descriptor.query_norm_width = query_norm.weight.shape[0]
            self.descriptor.key_norm_width = key_norm.weight.shape[0]
            self.descriptor.head_norm_eps = query_norm.eps
        self._pointer = ctypes.byref(self.descriptor)
        self._call = _library().outrider_attend

    def __call__(
        self, x: Tensor, cosines: Tensor, sines: Tensor, pasts: Pasts, *, layer_idx: int
    ) -> None:
        """Add attention's output to x [T, H], in place; everything in x's dtype, contiguous.

        cosines and sines [T, head_dim] of the rows' positions. The buffers in `pasts` get the rows'
        keys and values behind those that are there.
        """
        row, turn = x.shape[1] * x.element_size(), cosines.shape[1] * x.element_size()
        for begin, count, way in ways(x.shape[0], pasts.num_streamed):
            status = self._call(
                self._pointer,
                x.data_ptr() + begin * row,
                count,
                *pasts.part(layer_idx, way),
                cosines.data_ptr() + begin * turn,
                sines.data_ptr() + begin * turn,
                way,
                torch.get_num_threads(),
            )
            native.check_status(status)


class GatedMlp:
    """down(activation(gate x) * up x) of each row; gate and up are rounded, as modules do."""

    def __init__(
        self,
        gate: Projection,
        up: Projection,
        down: Projection,
        *,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        self._kept = (gate, up, down)
        self.descriptor = _Mlp(
            gate=described(gate),
            up=described(up),
            down=described(down),
            activation=ACTIVATIONS.index(canonical_activation(activation)),
            format=DTYPE_IDS[dtype],
        )
        self._num_outputs = down.shape[0]
        self._pointer = ctypes.byref(self.descriptor)
        self._call = _library().outrider_gated_mlp

    def __call__(self, x: Tensor, num_streamed: int) -> Tensor:
        """[T, K] contiguous -> [T, N]."""
        num_rows, size = x.shape[0], x.element_size()
        out = x.new_empty((num_rows, self._num_outputs))
        for begin, count, way in ways(num_rows, num_streamed):
            status = self._call(
                self._pointer,
                x.data_ptr() + begin * x.shape[1] * size,
                count,
                out.data_ptr() + begin * self._num_outputs * size,
                way,
                torch.get_num_threads(),
            )
            native.check_status(status)
        return out


def product(projection: Projection) -> Product:
    """The projection as a call by itself."""
    parts, shape, bias = projection.parts, projection.shape, projection.bias
    return Product(parts, shape, fmt=projection.fmt, bias=bias)


def add_residual(x: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """x += first + second, in place; the inner sum is rounded first, as modules do.

    All [T, H], contiguous and of one dtype.
    """
    native.check_status(
        _library().outrider_add_residual(
            x.data_ptr(),
            first.data_ptr(),
            None if second is None else second.data_ptr(),
            x.shape[0],
            x.shape[1],
            DTYPE_IDS[x.dtype],
            torch.get_num_threads(),
        )
    )


def token_outputs(
    hidden_states: Tensor,
    slots: Sequence[int],
    rows: Sequence[int],
    experts: ExpertWeights,
    *,
    out: Tensor,
    way: Way,
) -> None:
    """Some of one token's experts: write `out[rows[i]]` for the one in `slots[i]`, unweighted.

    hidden_states [1, H] and out [R, H] contiguous, of one dtype. The bits are those of
    `expert_mlp.expert_outputs`. Raises NativeArgumentError for a slot or row that is not there.
    """
    count = len(slots)
    native.check_status(
        _library().outrider_token_rows(
            ctypes.byref(native.experts_of(experts)),
            hidden_states.data_ptr(),
            (ctypes.c_int64 * count)(*slots),
            (ctypes.c_int64 * count)(*rows),
            count,
            out.shape[0],
            DTYPE_IDS[hidden_states.dtype],
            way,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )


def described(projection: Projection) -> Matrix:
    """The C descriptor of a projection; goes by addresses, keeps nothing alive."""
    return native.matrix_of(
        projection.parts, projection.shape, fmt=projection.fmt, bias=projection.bias
    )


def _library() -> ctypes.CDLL:
    lib = native.library()
    assert lib is not None, "asked for without is_available"
    return lib
