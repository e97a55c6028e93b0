"""One dense matrix product from the parts of a format: what stands for `nn.Linear`.

A few rows stream the weights through native code, and many in bf16 do where the processor has a
bf16 unit; else many rows go through PyTorch's fp32 product in blocks, since its bf16 and fp16
products are several times slower on processors without units for them. Either way products are
summed in fp32 and rounded once. Knows no model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from . import native
from .product import Product
from .quantization import dequantize

MAX_NATIVE_TOKENS = 32
"""Above this many rows the widened fp32 product is faster than native code that has no bf16 unit
(measured: bench/LOG.md)."""

_BLOCK_BYTES = 16 << 20


def linear(
    hidden_states: Tensor,
    parts: Mapping[str, Tensor],
    *,
    fmt: str,
    bias: Tensor | None = None,
    impl: str = "cpu",
) -> Tensor:
    """hidden_states [..., K] times the matrix [N, K] in `parts` -> [..., N], in the input's dtype.

    `parts` as `quantization.quantize` gives them. `impl` "reference" widens everything at once;
    "cpu" holds 16 MiB of widened weights at most and blocks until computed; "triton" queues on
    CUDA. Raises ValueError for another `impl`.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, K]
    shape = (_num_rows(parts, fmt, rows.shape[1]), rows.shape[1])
    if impl == "reference":
        out = _widened(rows, parts, shape, fmt=fmt, bias=bias)
    elif impl == "triton":
        from . import cuda

        out = cuda.linear(rows, parts, shape, fmt=fmt, bias=bias)
    elif impl != "cpu":
        raise ValueError(f"unknown implementation {impl!r}; accepted: reference, cpu, triton")
    elif fmt == "fp32" and rows.dtype == torch.float32:
        out = functional.linear(rows, parts["weight"], bias)
    elif (
        (rows.shape[0] <= MAX_NATIVE_TOKENS or native.has_bf16_products(fmt, rows.dtype))
        and native.is_available()
        and native.serves_width(fmt, shape[1])
        and rows.device.type == "cpu"
    ):
        out = rows.new_empty(rows.shape[0], shape[0])
        native.linear(
            rows.contiguous(),
            parts,
            shape,
            fmt=fmt,
            bias=bias,
            out=out,
            num_threads=torch.get_num_threads(),
        )
    else:
        out = _blocked(rows, parts, shape, fmt=fmt, bias=bias)
    return out.view(*hidden_states.shape[:-1], shape[0])


def prepared(
    parts: Mapping[str, Tensor], *, fmt: str, columns: int, bias: Tensor | None = None
) -> Product | None:
    """`linear` for up to MAX_NATIVE_TOKENS contiguous rows, or None where PyTorch computes.

    The same bits, for less time spent around them; see `product.Product`.
    """
    weight = parts["weight"]
    is_native = weight.device.type == "cpu" and native.is_available() and fmt != "fp32"
    if not (is_native and native.serves_width(fmt, columns)):
        return None
    return Product(parts, (_num_rows(parts, fmt, columns), columns), fmt=fmt, bias=bias)


def _num_rows(parts: Mapping[str, Tensor], fmt: str, columns: int) -> int:
    weight = parts["weight"]
    return 2 * weight.numel() // columns if fmt == "nf4" else weight.shape[0]


def _widened(
    rows: Tensor,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    fmt: str,
    bias: Tensor | None,
) -> Tensor:
    weight = dequantize(parts, fmt, dtype=torch.float32, shape=shape)
    wide = functional.linear(rows.float(), weight, None if bias is None else bias.float())
    return wide.to(rows.dtype)


def _blocked(
    rows: Tensor,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    fmt: str,
    bias: Tensor | None,
) -> Tensor:
    height = max(1, _BLOCK_BYTES // (4 * shape[1]))
    if fmt == "nf4" or shape[0] <= height:  # nf4's blocks run on over the ends of rows
        return _widened(rows, parts, shape, fmt=fmt, bias=bias)
    wide = rows.float()
    out = rows.new_empty(rows.shape[0], shape[0])
    for start in range(0, shape[0], height):
        block = {name: part[start : start + height] for name, part in parts.items()}
        size = (block["weight"].shape[0], shape[1])
        weight = dequantize(block, fmt, dtype=torch.float32, shape=size)
        part_bias = None if bias is None else bias[start : start + height].float()
        out[:, start : start + height] = functional.linear(wide, weight, part_bias)
    return out
