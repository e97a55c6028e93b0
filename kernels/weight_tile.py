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
def step_of(nibble):
    """nibble - 8 as fp32, exactly: under the bits of 2^23 a whole number is its own fraction.

    Conversions run at an eighth of the rate of these two operations on sm_86 (CUDA C++ programming
    guide, table of arithmetic throughput).
    """
    return (nibble | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def unpack_bytes(packed, levels_ptr, FORMAT: tl.constexpr):
    """Bytes -> what their low and their high nibbles stand for, before the scale, as fp32."""
    wide = packed.to(tl.int32)
    low, high = wide & 0xF, wide >> 4
    if FORMAT == "nf4":
        return tl.load(levels_ptr + low), tl.load(levels_ptr + high)
    return step_of(low), step_of(high)


@triton.jit
def unpack_groups(packed, levels_ptr, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """[N, 1, J] bytes of one group a row -> [N, 64] fp32 before the scale, in the inputs' order."""
    low, high = unpack_bytes(tl.reshape(packed, (ROWS, 32)), levels_ptr, FORMAT)
    if FORMAT == "nf4":
        return tl.reshape(tl.join(high, low), (ROWS, 64))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 64))


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
