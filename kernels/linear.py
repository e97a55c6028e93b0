"""A dense weight in any format times activations, for what is not an expert.

Knows one matrix and its parts; no layers, files or models.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import native
from .quantization import FormatError, check_parts
from .reference import linear_reference
from .weights import ACTIVATION_DTYPES


def linear(
    hidden_states: Tensor,
    parts: Mapping[str, Tensor],
    *,
    fmt: str,
    bias: Tensor | None = None,
    shape: tuple[int, int] | None = None,
    impl: str = "cpu",
) -> Tensor:
    """hidden_states [..., K] times the [N, K] matrix that `quantize` made `parts` of -> [..., N].

    `bias` [N]. `shape` is (N, K), needed for nf4 only. Inputs in their own dtype (fp32, bf16, fp16),
    fp32 inside, rounded once. `impl`: `reference`, or `cpu` (native code, PyTorch where none was built
    or the parts are not contiguous). A row's bits depend on the number of rows, not on its companions
    or the thread count, with the native kernels. Blocks until done.
    Raises FormatError for parts, bias or inputs that do not fit.
    """
    k = hidden_states.shape[-1]
    weight = parts["weight"]
    n, k = shape if shape is not None else (weight.shape[-2] if weight.dim() > 1 else 0, k)
    check_parts(parts, fmt, (n, k))
    if hidden_states.shape[-1] != k or hidden_states.dtype not in ACTIVATION_DTYPES:
        raise FormatError(
            f"expected activations [..., {k}] in float32, bfloat16 or float16; got "
            f"{hidden_states.dtype} {tuple(hidden_states.shape)}"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype not in ACTIVATION_DTYPES):
        raise FormatError(f"expected a bias [{n}]; got {bias.dtype} {tuple(bias.shape)}")
    if impl not in ("reference", "cpu"):
        raise FormatError(f"unknown implementation {impl!r}; accepted: reference, cpu")
    served = (
        impl == "cpu"
        and native.is_available()
        and native.serves_width(fmt, k)
        and all(part.device.type == "cpu" and part.is_contiguous() for part in parts.values())
    )
    if not served:
        return linear_reference(hidden_states, parts, (n, k), fmt=fmt, bias=bias)
    rows = hidden_states.reshape(-1, k).contiguous()
    out = rows.new_empty((rows.shape[0], n))
    native.linear(
        rows,
        parts,
        (n, k),
        fmt=fmt,
        bias=None if bias is None else bias.contiguous(),
        out=out,
        num_threads=torch.get_num_threads(),
    )
    return out.view(*hidden_states.shape[:-1], n)
