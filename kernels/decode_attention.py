"""Triton: attention of single tokens over keys and values that lie wherever their sequences do.

Letters: T rows (a sequence each), A query heads, G heads of keys and values, D head_dim. Where a
row's keys and values are, and how many, the kernels read from device memory: a captured graph stays
good while sequences grow, move and change places. A head's bits depend on its inputs and the number
of keys alone. Keys are cut over programs as flash-decoding does (Dao et al., 2023), in blocks dealt
in turn.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 32
NUM_SPLITS = 8
NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class DevicePasts:
    """Of each of T rows, int64 on the device: its position, how many keys its sequence has, the
    capacity they have room for, and each layer's addresses [L, T, 2] of keys and of values, both
    [G, capacity, D]."""

    positions: Tensor
    lengths: Tensor
    capacities: Tensor
    addresses: Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of a layer's attention, and the norms of its heads: weight [D], or [heads * D] for all
    at once; None for none. `window` keys are seen at most, 0 for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int = 0
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


@triton.jit
def _place_kernel(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    cosine_ptr,
    sine_ptr,
    position_ptr,
    length_ptr,
    capacity_ptr,
    address_ptr,
    query_ptr,
    eps,
    A: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norm and turn a head of qkv [T, (A + 2 G) D]; queries go to query [T, A, D], keys and values
    to their sequence; grid (T, A + 2 G). QUERY_NORM, KEY_NORM: values that a norm goes over."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kind = qkv_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    # Rotary turns the second half of a head against the first.
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    row_ptr = qkv_ptr + row * ((A + 2 * G) * D)
    value = tl.load(row_ptr + head * D + d, mask=mask, other=0.0).to(tl.float32)
    if head < A + G:
        other = tl.load(row_ptr + head * D + partner, mask=mask, other=0.0).to(tl.float32)
        if head < A:
            if QUERY_NORM > 0:
                value, other = _normed(
                    value, other, row_ptr, query_norm_ptr, head, d, partner, mask, eps,
                    D, QUERY_NORM, BLOCK_WIDTH, kind,
                )  # fmt: skip
        else:
            if KEY_NORM > 0:
                value, other = _normed(
                    value, other, row_ptr + A * D, key_norm_ptr, head - A, d, partner, mask, eps,
                    D, KEY_NORM, BLOCK_WIDTH, kind,
                )  # fmt: skip
        turn = tl.load(position_ptr + row) * D + d
        cosine = tl.load(cosine_ptr + turn, mask=mask, other=0.0).to(tl.float32)
        sine = tl.load(sine_ptr + turn, mask=mask, other=0.0).to(tl.float32)
        turned = (tl.where(d < D // 2, -other, other) * sine).to(kind).to(tl.float32)
        value = (value * cosine).to(kind).to(tl.float32) + turned
    if head < A:
        tl.store(query_ptr + (row * A + head) * D + d, value.to(kind), mask=mask)
    else:
        is_value = (head - A) // G
        kv_head = (head - A) % G
        address = tl.load(address_ptr + row * 2 + is_value)
        place = kv_head * tl.load(capacity_ptr + row) + tl.load(length_ptr + row)
        target = address.to(tl.pointer_type(kind)) + place * D
        tl.store(target + d, value.to(kind), mask=mask)


@triton.jit
def _normed(
    value, other, heads_ptr, weight_ptr, head, d, partner, mask, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """A head and its partners, over the rms of WIDTH values, times the norm's weight."""
    if WIDTH == D:
        squares = tl.sum(value * value, axis=0)
        first = 0
    else:
        columns = tl.arange(0, BLOCK_WIDTH)
        heads = tl.load(heads_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        squares = tl.sum(heads * heads, axis=0)
        first = head * D
    scale = 1.0 / tl.sqrt(squares / WIDTH + eps)
    weight = tl.load(weight_ptr + first + d, mask=mask, other=0.0).to(tl.float32)
    weight_of_other = tl.load(weight_ptr + first + partner, mask=mask, other=0.0).to(tl.float32)
    value = ((value * scale).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)
    other = ((other * scale).to(kind).to(tl.float32) * weight_of_other).to(kind).to(tl.float32)
    return value, other


@triton.jit
def _attend_kernel(
    query_ptr,
    length_ptr,
    capacity_ptr,
    address_ptr,
    part_ptr,
    scaling,
    A: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """part [T, A, SPLITS, D + 2] fp32: a head's values over its share of the keys, weighted by
    e^(score - largest), then the largest and the sum of weights; grid (T, A, SPLITS)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    kind = query_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    num_keys = tl.load(length_ptr + row) + 1
    kv_start = (head // (A // G)) * tl.load(capacity_ptr + row) * D
    keys = tl.load(address_ptr + row * 2).to(tl.pointer_type(kind)) + kv_start
    values = tl.load(address_ptr + row * 2 + 1).to(tl.pointer_type(kind)) + kv_start
    if D % 16 == 0:
        # Buffers begin at 256 bytes or more, and every head's rows at a multiple of D.
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
    query = tl.load(query_ptr + (row * A + head) * D + d, mask=mask, other=0.0).to(tl.float32)
    first = num_keys * 0
    if WINDOW > 0:
        first = tl.maximum(num_keys - WINDOW, 0)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first + split * BLOCK_KEYS, num_keys, SPLITS * BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = key[:, None] * D + d[None, :]
        is_seen = (key < num_keys)[:, None] & mask[None, :]
        k = tl.load(keys + at, mask=is_seen, other=0.0).to(tl.float32)
        scores = tl.sum(k * query[None, :], axis=1) * scaling
        scores = tl.where(key < num_keys, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=0))
        fade = tl.exp(largest - higher)
        weights = tl.exp(scores - higher)
        v = tl.load(values + at, mask=is_seen, other=0.0).to(tl.float32)
        sums = sums * fade + tl.sum(v * weights[:, None], axis=0)
        total = total * fade + tl.sum(weights, axis=0)
        largest = higher
    part = part_ptr + ((row * A + head) * SPLITS + split) * (D + 2)
    tl.store(part + d, sums, mask=mask)
    tl.store(part + D, largest)
    tl.store(part + D + 1, total)


@triton.jit
def _merge_kernel(part_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [T, A, D] of part [T, A, SPLITS, D + 2]; grid (T * A,)."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    split = tl.arange(0, SPLITS)
    part = part_ptr + (head * SPLITS + split) * (D + 2)
    largest = tl.load(part + D)
    scale = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(tl.load(part + D + 1) * scale, axis=0)
    mask = (d < D)[None, :]
    sums = tl.load(part[:, None] + d[None, :], mask=mask, other=0.0) * scale[:, None]
    out = tl.div_rn(tl.sum(sums, axis=0), total)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def attend(
    qkv: Tensor,
    heads: Heads,
    pasts: DevicePasts,
    turns: tuple[Tensor, Tensor],
    *,
    layer_idx: int,
    out: Tensor,
) -> None:
    """qkv [T, (A + 2 G) D] -> out [T, A D]; keys and values are appended. Queues, does not wait.

    `turns` are cosines and sines [positions, D] of all positions. Whoever reads `lengths` next
    counts the rows that were appended.
    """
    num_rows, dim = qkv.shape[0], heads.head_dim
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads
    block_d = triton.next_power_of_2(dim)
    addresses = pasts.addresses[layer_idx]
    query = qkv.new_empty(num_rows, num_heads, dim)
    place: Any = _place_kernel
    place[(num_rows, num_heads + 2 * num_kv_heads)](
        qkv,
        qkv if heads.query_norm is None else heads.query_norm,
        qkv if heads.key_norm is None else heads.key_norm,
        *turns,
        pasts.positions,
        pasts.lengths,
        pasts.capacities,
        addresses,
        query,
        heads.eps,
        A=num_heads,
        G=num_kv_heads,
        D=dim,
        QUERY_NORM=0 if heads.query_norm is None else heads.query_norm.numel(),
        KEY_NORM=0 if heads.key_norm is None else heads.key_norm.numel(),
        BLOCK_WIDTH=triton.next_power_of_2(num_heads * dim),
        BLOCK_D=block_d,
        num_warps=1,
    )
    parts = qkv.new_empty(num_rows, num_heads, NUM_SPLITS, dim + 2, dtype=torch.float32)
    over_keys: Any = _attend_kernel
    over_keys[(num_rows, num_heads, NUM_SPLITS)](
        query,
        pasts.lengths,
        pasts.capacities,
        addresses,
        parts,
        heads.scaling,
        A=num_heads,
        G=num_kv_heads,
        D=dim,
        WINDOW=heads.window,
        SPLITS=NUM_SPLITS,
        BLOCK_KEYS=BLOCK_KEYS,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
    )
    merge: Any = _merge_kernel
    merge[(num_rows * num_heads,)](
        parts, out, D=dim, SPLITS=NUM_SPLITS, BLOCK_D=block_d, num_warps=1
    )
