"""Triton: every expert once for all its tokens (prefill), rows sorted by slot.

Letters: M sorted rows, N weight rows, K inputs; tiles of BLOCK_M rows of one slot. Products run on
the activations' dtype with fp32 sums: int8 and int4 weights are exact in it and scaled afterwards,
nf4 weights are rounded to it, and so is the row between the projections, which decode keeps in
fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import Blocks, block_sizes
from .gathered import levels_of
from .operands import Operand
from .quantization import PLAIN_DTYPES
from .routing import RoutingPlan
from .weight_tile import gated, load_bytes, load_plain, load_scales, unpack_groups


@triton.jit
def _tile_dot(
    x_ptr,
    x_rows,
    m_mask,
    w_ptr,
    s_ptr,
    levels_ptr,
    rows,
    row_mask,
    K,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32: gathered input rows times weight rows."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FORMAT == "int4" or FORMAT == "nf4":
        num_groups = (K + 63) // 64
        inputs = tl.arange(0, 64)
        for group in range(0, num_groups):
            one = group + tl.arange(0, 1)
            packed = load_bytes(w_ptr, rows, row_mask, one, one < num_groups, num_groups)
            scales = load_scales(s_ptr, rows, row_mask, one, one < num_groups, num_groups)
            k = group * 64 + inputs
            x = tl.load(
                x_ptr + x_rows[:, None] + k[None, :],
                mask=m_mask[:, None] & (k < K)[None, :],
                other=0.0,
            )
            w = unpack_groups(packed, levels_ptr, FORMAT, BLOCK_N)
            if FORMAT == "nf4":
                w *= scales
                total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
            else:
                part = tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
                total += part * tl.reshape(scales, (1, BLOCK_N))
        return total
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + x_rows[:, None] + k[None, :],
            mask=m_mask[:, None] & (k < K)[None, :],
            other=0.0,
        )
        w = load_plain(w_ptr, rows, row_mask, k, k < K, stride_n, stride_k)
        if WIDE:
            x = x.to(tl.float32)
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    if FORMAT == "int8":
        total *= tl.load(s_ptr + rows, mask=row_mask, other=0.0)[None, :]
    return total


@triton.jit
def _grouped_kernel(
    x_ptr,
    source_ptr,
    target_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    tile_end_ptr,
    w_ptr,
    s_ptr,
    bias_ptr,
    levels_ptr,
    out_ptr,
    N,
    K,
    x_stride,
    w_slot,
    s_slot,
    bias_slot,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONCATENATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[target of each sorted row, N] = x[source of it] times the tile's slot; grid (tiles, N /
    BLOCK_N).

    ACTIVATION "": N weight rows, no activation. Otherwise 2 N of them, gated to N columns. WIDE:
    inputs and weights of different float dtypes meet in fp32.
    """
    slot = tl.load(tile_slot_ptr + tl.program_id(0))
    if slot >= 0:
        start = tl.load(tile_start_ptr + tl.program_id(0))
        end = tl.load(tile_end_ptr + tl.program_id(0))
        m = start + tl.arange(0, BLOCK_M)
        m_mask = m < end
        x_rows = tl.load(source_ptr + m, mask=m_mask, other=0).to(tl.int64) * x_stride
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = columns < N
        rows = columns.to(tl.int64)
        w_ptr += slot * w_slot
        s_ptr += slot * s_slot
        bias_ptr += slot * bias_slot
        if ACTIVATION == "":
            total = _tile_dot(
                x_ptr, x_rows, m_mask, w_ptr, s_ptr, levels_ptr, rows, mask, K,
                stride_n, stride_k, FORMAT, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if HAS_BIAS:
                bias = tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
                total += bias[None, :]
        else:
            if CONCATENATED:
                gate_rows, up_rows = rows, rows + N
            else:
                gate_rows, up_rows = 2 * rows, 2 * rows + 1
            gate = _tile_dot(
                x_ptr, x_rows, m_mask, w_ptr, s_ptr, levels_ptr, gate_rows, mask, K,
                stride_n, stride_k, FORMAT, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            up = _tile_dot(
                x_ptr, x_rows, m_mask, w_ptr, s_ptr, levels_ptr, up_rows, mask, K,
                stride_n, stride_k, FORMAT, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if HAS_BIAS:
                gate_bias = tl.load(bias_ptr + gate_rows, mask=mask, other=0.0).to(tl.float32)
                up_bias = tl.load(bias_ptr + up_rows, mask=mask, other=0.0).to(tl.float32)
                gate += gate_bias[None, :]
                up += up_bias[None, :]
            total = gated(gate, up, ACTIVATION)
        target = tl.load(target_ptr + m, mask=m_mask, other=0).to(tl.int64) * N
        tl.store(
            out_ptr + target[:, None] + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=m_mask[:, None] & mask[None, :],
        )


def tile_blocks(rows: Tensor, fmt: str) -> Blocks:
    """Block sizes of a grouped product of `rows` [.., K]; fp32's where the product runs in fp32."""
    is_wide = rows.dtype == torch.float32 or _is_mixed(rows, fmt)
    return block_sizes("grouped", "fp32" if is_wide else fmt, rows.shape[1], device=rows.device)


def grouped_rows(
    rows: Tensor,
    plan: RoutingPlan,
    operand: Operand,
    *,
    blocks: Blocks,
    sources: Tensor,
    targets: Tensor,
    out: Tensor,
    activation: str = "",
    is_concatenated: bool = True,
) -> None:
    """out[targets[i]] [.., N] = rows[sources[i]] [K] times the matrix of sorted row i's slot.

    sources, targets [M] int64 by the plan's sorted rows. `activation`: gate and up rows become N
    columns. One launch over the plan's tiles, no host sync. `blocks.block_m` is the plan's.
    """
    num_columns, width = out.shape[1], rows.shape[1]
    kernel: Any = _grouped_kernel
    kernel[(plan.tile_slots.shape[0], triton.cdiv(num_columns, blocks.block_n))](
        rows,
        sources,
        targets,
        plan.tile_slots,
        plan.tile_starts,
        plan.tile_ends,
        operand.weight,
        operand.scale,
        operand.bias,
        levels_of(rows.device),
        out,
        num_columns,
        width,
        rows.stride(0),
        operand.weight_slot,
        operand.scale_slot,
        operand.bias_slot,
        operand.stride_n,
        operand.stride_k,
        FORMAT=operand.kind,
        WIDE=_is_mixed(rows, operand.fmt),
        ACTIVATION=activation,
        CONCATENATED=is_concatenated,
        HAS_BIAS=operand.has_bias,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        **blocks.options,
    )


def _is_mixed(rows: Tensor, fmt: str) -> bool:
    return fmt in PLAIN_DTYPES and PLAIN_DTYPES[fmt] != rows.dtype
