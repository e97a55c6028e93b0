"""What a Triton launch needs to know of a matrix in slots: tensors, strides in elements, kind.

Knows parts of formats; computes nothing and loads no Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .quantization import PLAIN_DTYPES


@dataclass(frozen=True, slots=True)
class Operand:
    """One matrix a slot: row n, input k of plain and int8 weights lies at weight + slot *
    weight_slot + n * stride_n + k * stride_k; int4 and nf4 rows are whole groups, one after the
    other. Unused tensors repeat the weight, so that every argument is a tensor. `kind` is the
    kernels' FORMAT: plain, int8, int4 or nf4."""

    weight: Tensor
    scale: Tensor
    bias: Tensor
    weight_slot: int
    scale_slot: int
    bias_slot: int
    stride_n: int
    stride_k: int
    has_bias: bool
    fmt: str
    kind: str


def operand_of(
    parts: Mapping[str, Tensor], bias: Tensor | None, *, fmt: str, is_transposed: bool = False
) -> Operand:
    """Describe `parts` [S, ...] of `fmt` (checked by the caller) and bias [S, N] for a launch."""
    weight = parts["weight"]
    scale = parts.get("scale", parts.get("absmax"))
    is_plain = fmt in PLAIN_DTYPES
    stride_n = weight.stride(-2) if is_plain or fmt == "int8" else 0
    stride_k = weight.stride(-1)
    if is_transposed:
        stride_n, stride_k = stride_k, stride_n
    return Operand(
        weight=weight,
        scale=weight if scale is None else scale,
        bias=weight if bias is None else bias,
        weight_slot=weight.stride(0),
        scale_slot=0 if scale is None else scale.stride(0),
        bias_slot=0 if bias is None else bias.stride(0),
        stride_n=stride_n,
        stride_k=stride_k,
        has_bias=bias is not None,
        fmt=fmt,
        kind="plain" if is_plain else fmt,
    )
