"""Triton: a router's choice of experts from its logits, one launch for all rows.

Letters: T rows, E experts, K chosen. The device's counterpart of `router`: the same roundings, but
of scores that are equal the lowest id is taken, where torch.topk leaves it open.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .router import ChoiceRule

NUM_WARPS = 1


@triton.jit
def _choose_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    E,
    epsilon,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    RENORMALISED: tl.constexpr,
    ROUNDS_SCORES: tl.constexpr,
    ROUNDS_WEIGHTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """ids and weights [T, K] of logits [T, E], weights descending; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    mask = expert < E
    kind = logits_ptr.dtype.element_ty
    logits = tl.load(logits_ptr + row * E + expert, mask=mask, other=float("-inf")).to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, axis=0))
    scores = powers / tl.sum(powers, axis=0)
    if ROUNDS_SCORES:
        scores = scores.to(kind).to(tl.float32)
    # A NaN is never the larger, so that the ids are distinct whatever the logits.
    scores = tl.where(mask, tl.where(scores == scores, scores, 0.0), -1.0)
    choice = tl.arange(0, PADDED_K)
    ids = tl.zeros((PADDED_K,), tl.int64)
    weights = tl.zeros((PADDED_K,), tl.float32)
    for k in range(TOP_K):
        best = tl.argmax(scores, axis=0)
        ids = tl.where(choice == k, best.to(tl.int64), ids)
        weights = tl.where(choice == k, tl.max(scores, axis=0), weights)
        scores = tl.where(expert == best, -2.0, scores)
    if RENORMALISED:
        total = tl.sum(weights, axis=0)
        if ROUNDS_SCORES:
            total = (total.to(kind).to(tl.float32) + epsilon).to(kind).to(tl.float32)
            weights = (weights / total).to(kind).to(tl.float32)
        else:
            weights = weights / (total + epsilon)
    if ROUNDS_WEIGHTS:
        weights = weights.to(kind).to(tl.float32)
    at = row * TOP_K + choice
    tl.store(ids_ptr + at, ids, mask=choice < TOP_K)
    tl.store(weights_ptr + at, weights, mask=choice < TOP_K)


def choose(logits: Tensor, rule: ChoiceRule, *, ids: Tensor, weights: Tensor) -> None:
    """logits [T, E] -> ids [T, K] int64 and weights [T, K] fp32. Queues, does not wait."""
    kernel: Any = _choose_kernel
    kernel[(logits.shape[0],)](
        logits,
        ids,
        weights,
        logits.shape[1],
        rule.epsilon,
        TOP_K=rule.top_k,
        PADDED_K=triton.next_power_of_2(rule.top_k),
        RENORMALISED=rule.is_renormalised,
        ROUNDS_SCORES=rule.rounds_scores,
        ROUNDS_WEIGHTS=rule.rounds_weights,
        BLOCK_E=triton.next_power_of_2(logits.shape[1]),
        num_warps=NUM_WARPS,
    )
