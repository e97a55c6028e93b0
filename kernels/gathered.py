"""Triton: a few tokens' experts straight out of the slots (decode), weight rows by assignment.

Letters: T tokens, N assignments (token, slot), S slots, H hidden, I intermediate, K inputs of a
row. A program streams BLOCK_N weight rows for one assignment and sums in fp32; assignments share
nothing, so a row's bits depend on its input and its expert alone.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_sizes
from .operands import Operand
from .quantization import NF4_LEVELS
from .weight_tile import (
    gated,
    load_bytes,
    load_plain,
    load_scales,
    nibble_inputs,
    unpack_bytes,
)


@triton.jit
def _rows_dot(
    x_ptr,
    w_ptr,
    s_ptr,
    levels_ptr,
    rows,
    row_mask,
    K,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N] fp32 dot products of weight rows with one token's K inputs."""
    if FORMAT == "int4" or FORMAT == "nf4":
        GROUPS: tl.constexpr = BLOCK_K // 64
        num_groups = (K + 63) // 64
        total = tl.zeros((BLOCK_N, GROUPS, 32), dtype=tl.float32)
        for start in range(0, num_groups, GROUPS):
            groups = start + tl.arange(0, GROUPS)
            group_mask = groups < num_groups
            packed = load_bytes(w_ptr, rows, row_mask, groups, group_mask, num_groups)
            scales = load_scales(s_ptr, rows, row_mask, groups, group_mask, num_groups)
            low, high = unpack_bytes(packed, levels_ptr, FORMAT)
            low_k, high_k = nibble_inputs(groups, FORMAT)
            x_low = tl.load(x_ptr + low_k, mask=low_k < K, other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + high_k, mask=high_k < K, other=0.0).to(tl.float32)
            products = low * x_low[None, :, :] + high * x_high[None, :, :]
            total += products * scales[:, :, None]
        return tl.sum(tl.sum(total, axis=2), axis=1)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = load_plain(w_ptr, rows, row_mask, k, k < K, stride_n, stride_k)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
    dot = tl.sum(total, axis=1)
    if FORMAT == "int8":
        dot *= tl.load(s_ptr + rows, mask=row_mask, other=0.0)
    return dot


@triton.jit
def _gate_up_kernel(
    x_ptr,
    token_ptr,
    slot_ptr,
    w_ptr,
    s_ptr,
    bias_ptr,
    levels_ptr,
    h_ptr,
    H,
    INNER,
    x_stride,
    w_slot,
    s_slot,
    bias_slot,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONCATENATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h [N, I] fp32 = activation(gate) * up of each assignment; grid (N, I / BLOCK_N)."""
    assignment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < INNER
    token = tl.load(token_ptr + assignment).to(tl.int64)
    slot = tl.load(slot_ptr + assignment).to(tl.int64)
    x_ptr += token * x_stride
    w_ptr += slot * w_slot
    s_ptr += slot * s_slot
    if CONCATENATED:
        gate_rows = columns.to(tl.int64)
        up_rows = gate_rows + INNER
    else:
        gate_rows = columns.to(tl.int64) * 2
        up_rows = gate_rows + 1
    gate = _rows_dot(
        x_ptr, w_ptr, s_ptr, levels_ptr, gate_rows, mask, H, stride_n, stride_k,
        FORMAT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = _rows_dot(
        x_ptr, w_ptr, s_ptr, levels_ptr, up_rows, mask, H, stride_n, stride_k,
        FORMAT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        bias_ptr += slot * bias_slot
        gate += tl.load(bias_ptr + gate_rows, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + up_rows, mask=mask, other=0.0).to(tl.float32)
    h = gated(gate, up, ACTIVATION)
    tl.store(h_ptr + assignment.to(tl.int64) * INNER + columns, h, mask=mask)


@triton.jit
def _rows_kernel(
    x_ptr,
    slot_ptr,
    target_ptr,
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
    DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[target of row i, N] = x[i] times its slot's matrix, rounded once; grid (rows, N /
    BLOCK_N). DENSE: all rows use slot 0 and go to out[i]; slot_ptr and target_ptr are not read."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    rows = columns.to(tl.int64)
    target = row
    if not DENSE:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        target = tl.load(target_ptr + row).to(tl.int64)
        w_ptr += slot * w_slot
        s_ptr += slot * s_slot
        bias_ptr += slot * bias_slot
    total = _rows_dot(
        x_ptr + row * x_stride, w_ptr, s_ptr, levels_ptr, rows, mask, K, stride_n, stride_k,
        FORMAT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + target * N + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def levels_of(device: torch.device) -> Tensor:
    """The sixteen nf4 levels as fp32 on `device`; kept, since a copy would wait for the device."""
    return torch.tensor(NF4_LEVELS, device=device)


def gated_rows(
    hidden_states: Tensor,
    token_idx: Tensor,
    slot_ids: Tensor,
    gate_up: Operand,
    *,
    inner: int,
    activation: str,
    is_concatenated: bool,
) -> Tensor:
    """activation(gate) * up of each assignment: [T, H], [N], [N] -> [N, I] fp32; one launch."""
    num_assignments, hidden = token_idx.shape[0], hidden_states.shape[1]
    h = hidden_states.new_empty((num_assignments, inner), dtype=torch.float32)
    blocks = block_sizes("gathered", gate_up.fmt, hidden, device=hidden_states.device)
    kernel: Any = _gate_up_kernel
    kernel[(num_assignments, triton.cdiv(inner, blocks.block_n))](
        hidden_states,
        token_idx,
        slot_ids,
        gate_up.weight,
        gate_up.scale,
        gate_up.bias,
        levels_of(hidden_states.device),
        h,
        hidden,
        inner,
        hidden_states.stride(0),
        gate_up.weight_slot,
        gate_up.scale_slot,
        gate_up.bias_slot,
        gate_up.stride_n,
        gate_up.stride_k,
        FORMAT=gate_up.kind,
        ACTIVATION=activation,
        CONCATENATED=is_concatenated,
        HAS_BIAS=gate_up.has_bias,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        **blocks.options,
    )
    return h


def matrix_rows(
    rows: Tensor,
    operand: Operand,
    *,
    out: Tensor,
    slot_ids: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> None:
    """out[out_rows[i]] [.., N] = rows[i] [K] times the matrix in slot_ids[i]; one launch.

    Without slot_ids: every row by slot 0, to out[i].
    """
    num_rows, width = rows.shape
    blocks = block_sizes("gathered", operand.fmt, width, device=rows.device)
    kernel: Any = _rows_kernel
    kernel[(num_rows, triton.cdiv(out.shape[1], blocks.block_n))](
        rows,
        operand.weight if slot_ids is None else slot_ids,
        operand.weight if out_rows is None else out_rows,
        operand.weight,
        operand.scale,
        operand.bias,
        levels_of(rows.device),
        out,
        out.shape[1],
        width,
        rows.stride(0),
        operand.weight_slot,
        operand.scale_slot,
        operand.bias_slot,
        operand.stride_n,
        operand.stride_k,
        FORMAT=operand.kind,
        DENSE=slot_ids is None,
        HAS_BIAS=operand.has_bias,
        BLOCK_N=blocks.block_n,
        BLOCK_K=blocks.block_k,
        **blocks.options,
    )
