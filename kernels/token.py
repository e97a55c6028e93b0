"""One token through the parts of a decoder layer: a native call each.

Descriptors are made once and go by the addresses of the tensors they keep alive, which must stay
where they are. Knows matrices, keys and values; no model. There is no second implementation here:
where the native library is missing, `is_available` says so and a model's own modules compute.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .activation import ACTIVATIONS, canonical_activation
from .native import DTYPE_IDS, Matrix
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
        self._weight = weight
        self._call = _library().outrider_rms_norm
        self._arguments = (weight.data_ptr(), eps, weight.shape[0], DTYPE_IDS[weight.dtype])

    def __call__(self, x: Tensor) -> Tensor:
        """[1, H] contiguous, in the weight's dtype -> [1, H]."""
        out = torch.empty_like(x)
        native.check_status(self._call(x.data_ptr(), *self._arguments, out.data_ptr()))
        return out


class TokenAttention:
    """A layer's attention for one token: norm, projections, rotary, its past, output, residual.

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
        query, key, value, output = (_matrix(one) for one in projections)
        self._layer = _Attention(
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
            self._layer.query_norm = query_norm.weight.data_ptr()
            self._layer.key_norm = key_norm.weight.data_ptr()
            self._layer.query_norm_width = query_norm.weight.shape[0]
            self._layer.key_norm_width = key_norm.weight.shape[0]
            self._layer.head_norm_eps = query_norm.eps
        self._pointer = ctypes.byref(self._layer)
        self._call = _library().outrider_attend

    def __call__(
        self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, length: int
    ) -> None:
        """Add attention's output to x [1, H], in place; everything in x's dtype, contiguous.

        cosine and sine [head_dim] of the token's position; keys and values [1, kv_heads, capacity,
        head_dim] hold `length` rows, and get the token's as the next: there must be room.
        """
        native.check_status(
            self._call(
                self._pointer,
                x.data_ptr(),
                cosine.data_ptr(),
                sine.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                keys.shape[2],
                length,
                torch.get_num_threads(),
            )
        )


class TokenMlp:
    """down(activation(gate x) * up x) for one token; gate and up are rounded, as modules do."""

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
        self._layer = _Mlp(
            gate=_matrix(gate),
            up=_matrix(up),
            down=_matrix(down),
            activation=ACTIVATIONS.index(canonical_activation(activation)),
            format=DTYPE_IDS[dtype],
        )
        self._num_outputs = down.shape[0]
        self._pointer = ctypes.byref(self._layer)
        self._call = _library().outrider_gated_mlp

    def __call__(self, x: Tensor) -> Tensor:
        """[1, K] contiguous -> [1, N]."""
        out = x.new_empty((1, self._num_outputs))
        native.check_status(
            self._call(self._pointer, x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        )
        return out


def add_residual(x: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """x += first + second, in place; the inner sum is rounded first, as modules do.

    All contiguous, of one dtype and size.
    """
    native.check_status(
        _library().outrider_add_residual(
            x.data_ptr(),
            first.data_ptr(),
            None if second is None else second.data_ptr(),
            x.numel(),
            DTYPE_IDS[x.dtype],
        )
    )


def token_experts(
    hidden_states: Tensor, slots: Sequence[int], weights: Sequence[float], experts: ExpertWeights
) -> Tensor:
    """One token's experts, combined: hidden_states [1, H] contiguous -> [1, H].

    `slots` and `weights` stand in ascending order of the experts' ids, which is the order of the
    sum. The bits are those of `expert_mlp.expert_outputs` and `expert_mlp.combine`. Raises
    NativeArgumentError for a slot that the arena has not.
    """
    count = len(slots)
    out = torch.empty_like(hidden_states)
    native.check_status(
        _library().outrider_token_experts(
            ctypes.byref(native.experts_of(experts)),
            hidden_states.data_ptr(),
            (ctypes.c_int64 * count)(*slots),
            (ctypes.c_float * count)(*weights),
            count,
            DTYPE_IDS[hidden_states.dtype],
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


def _matrix(projection: Projection) -> Matrix:
    return native.matrix_of(
        projection.parts, projection.shape, fmt=projection.fmt, bias=projection.bias
    )


def _library() -> ctypes.CDLL:
    lib = native.library()
    assert lib is not None, "asked for without is_available"
    return lib
