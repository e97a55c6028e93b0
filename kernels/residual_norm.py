"""Triton: a decoder layer's residual sum and the RMS norm behind it, one launch for both.

Letters: T rows, H hidden. Rounds where Llama's modules do: the sum of what is added, the residual,
the row before and after the norm's weight.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4


@triton.jit
def _residual_norm_kernel(
    x_ptr,
    first_ptr,
    second_ptr,
    weight_ptr,
    out_ptr,
    H,
    eps,
    NUM_ADDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """x [T, H] += first + second, in place; out = weight * x / rms(x); grid (T,)."""
    columns = tl.arange(0, BLOCK_H)
    mask = columns < H
    at = tl.program_id(0).to(tl.int64) * H + columns
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if NUM_ADDED > 0:
        added = tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NUM_ADDED > 1:
            added += tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
            added = added.to(kind).to(tl.float32)
        x = (x + added).to(kind).to(tl.float32)
        tl.store(x_ptr + at, x.to(kind), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / H + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    normed = (x * scale).to(kind).to(tl.float32) * weight
    tl.store(out_ptr + at, normed.to(kind), mask=mask)


def residual_norm(
    x: Tensor, added: tuple[Tensor, ...], weight: Tensor, eps: float, *, out: Tensor
) -> None:
    """x += the sum of `added` (at most two), in place; out = RmsNorm(x). Queues, does not wait.

    All [T, H] contiguous, in one dtype; weight [H] in any float dtype.
    """
    first = added[0] if added else x
    kernel: Any = _residual_norm_kernel
    kernel[(x.shape[0],)](
        x,
        first,
        added[1] if len(added) > 1 else first,
        weight,
        out,
        x.shape[1],
        eps,
        NUM_ADDED=len(added),
        BLOCK_H=triton.next_power_of_2(x.shape[1]),
        num_warps=NUM_WARPS,
    )
