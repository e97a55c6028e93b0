"""Triton: the fixed-order combine of a token's experts, without atomics.

Letters: T tokens, K experts a token, H hidden.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 1024
NUM_WARPS = 4


@triton.jit
def _combine_kernel(
    outputs_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    H,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out [T, H]: a token's rows by ascending id, equal ids as they stand; grid (T, H / BLOCK_H).

    Needs enable_fp_fusion=False: each product and each sum is rounded to fp32 by itself.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = columns < H
    choice = tl.arange(0, PADDED_K)
    last = tl.full((PADDED_K,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    ids = tl.load(ids_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=0).to(tl.int64)
    ids = tl.where(choice < TOP_K, ids, last)
    # Minus zero is the one number that leaves the first product as it is, its sign too.
    total = tl.full((BLOCK_H,), -0.0, tl.float32)
    for _ in range(TOP_K):
        first = tl.argmin(ids, axis=0)
        ids = tl.where(choice == first, last, ids)
        row = token * TOP_K + first
        scale = tl.load(weights_ptr + row).to(tl.float32)
        values = tl.load(outputs_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        total = total + scale * values
    tl.store(out_ptr + token * H + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(outputs: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """See `expert_mlp.combine`; one launch. Ids are below 2^63 - 1."""
    num_tokens, top_k, hidden = outputs.shape
    out = outputs.new_empty((num_tokens, hidden))
    if num_tokens == 0:
        return out
    kernel: Any = _combine_kernel
    kernel[(num_tokens, triton.cdiv(hidden, BLOCK_H))](
        outputs.contiguous(),
        topk_weights.float().contiguous(),
        topk_ids.contiguous(),
        out,
        hidden,
        TOP_K=top_k,
        PADDED_K=triton.next_power_of_2(top_k),
        BLOCK_H=BLOCK_H,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
