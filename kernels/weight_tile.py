"""Triton: pieces of a weight matrix in a slot, as kernels take them, and what follows a product.

Letters: N output rows, K inputs, G groups of 64 along K, J bytes of a group (32). All offsets are
int64, all dimensions masked. FORMAT is a constexpr: plain (any float dtype), int8, int4, nf4.
"""

import triton
import triton.language as tl

ALPHA: tl.constexpr = tl.constexpr(1.702)
LIMIT: tl.constexpr = tl.constexpr(7.0)


@triton.jit
def load_plain(w_ptr, rows, row_mask, k, k_mask, stride_n, stride_k):
    """[N, K] weights of rows x inputs k, zeros where masked."""
    offsets = rows[:, None] * stride_n + k[None, :].to(tl.int64) * stride_k
    return tl.load(w_ptr + offsets, mask=row_mask[:, None] & k_mask[None, :], other=0.0)


@triton.jit
def load_bytes(w_ptr, rows, row_mask, groups, group_mask, num_groups):
    """[N, G, J] packed bytes of the groups of each row (rows are whole groups, end to end)."""
    byte = tl.arange(0, 32)
    group = rows[:, None] * num_groups + groups[None, :].to(tl.int64)
    offsets = group[:, :, None] * 32 + byte[None, None, :]
    mask = row_mask[:, None, None] & group_mask[None, :, None]
    return tl.load(w_ptr + offsets, mask=mask, other=0)


@triton.jit
def load_scales(s_ptr, rows, row_mask, groups, group_mask, num_groups):
    """[N, G] scales or absmax of the groups as fp32, zeros where masked."""
    offsets = rows[:, None] * num_groups + groups[None, :].to(tl.int64)
    mask = row_mask[:, None] & group_mask[None, :]
    return tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dequantize_bytes(packed, scales, levels_ptr, FORMAT: tl.constexpr):
    """[N, G, J] bytes and [N, G] scales -> the fp32 weights of the low and of the high nibbles.

    int4: (nibble - 8) * scale. nf4: level * absmax, one rounding, as bitsandbytes has it in fp32.
    """
    low, high = packed & 0xF, (packed >> 4) & 0xF
    if FORMAT == "nf4":
        low_value = tl.load(levels_ptr + low.to(tl.int32))
        high_value = tl.load(levels_ptr + high.to(tl.int32))
    else:
        low_value = low.to(tl.float32) - 8.0
        high_value = high.to(tl.float32) - 8.0
    return low_value * scales[:, :, None], high_value * scales[:, :, None]


@triton.jit
def nibble_inputs(groups, FORMAT: tl.constexpr):
    """[G, J] indices along K that the low and the high nibbles meet."""
    byte = tl.arange(0, 32)
    start = groups[:, None] * 64
    if FORMAT == "nf4":
        low, high = start + 2 * byte[None, :] + 1, start + 2 * byte[None, :]
    else:
        low, high = start + byte[None, :], start + byte[None, :] + 32
    return low, high


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up in fp32; `clamped_swiglu` is gpt_oss'."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    if ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(inner) * up
    if ACTIVATION == "relu":
        # not a maximum: a NaN must stay one
        return tl.where(gate <= 0.0, 0.0, gate) * up
    if ACTIVATION == "relu2":
        positive = tl.where(gate <= 0.0, 0.0, gate)
        return positive * positive * up
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate * tl.sigmoid(gate * ALPHA) * (up + 1.0)
