"""One pass over traces that counts everything the analysis needs; memory does not grow with
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..schema import ModelShape
from ..trace.batch import TraceBatch
from .measures import shares
from .reuse import ReuseCounts

NUM_PERIODS = 20
NUM_PARTS = 8
_MAX_TOKEN_CELLS = 64 << 20


class RoutingCounts:
    """Counts of routing, [L, ...] per layer. Feed batches in order; attributes are the counts.

    `usage` [D, L, E] by data set; `joint` [L, E, E] pairs chosen for one token (single uses on the
    diagonal); `top_pairs` [L, E, E] unordered top-2 pairs (low, high); `layer_steps` [L - 1, E, E]
    first expert here to first expert of the next layer; `token_steps` [L, E, E] first expert to
    that of the next token; `overlap` [L] experts shared with the previous token over
    `overlap_tokens`; `router_entropy` [L] sum of per-token entropies over `entropy_tokens`;
    `part_usage` [P, L, E] by part of the window; `period_usage` [S, L, E] by part of the
    collection; `token_usage` [L, V, E] by token id for the `tokens_seen` first met; `similarity`
    [L, E, E] and `probability` [L, E] sums of products and of router probabilities over
    `entropy_tokens`.
    """

    def __init__(
        self,
        shape: ModelShape,
        dataset_names: Sequence[str],
        *,
        window: int,
        num_samples: int,
    ) -> None:
        layers, experts = shape.num_moe_layers, shape.num_experts
        self.shape = shape
        self.dataset_names = tuple(dataset_names)
        self.window = window
        self.num_samples = num_samples
        self.tokens = np.zeros(len(dataset_names), dtype=np.int64)
        self.samples = np.zeros(len(dataset_names), dtype=np.int64)
        self.usage = np.zeros((len(dataset_names), layers, experts), dtype=np.int64)
        self.top_pairs_by_dataset = np.zeros((len(dataset_names), layers, experts**2), dtype=bool)
        self.joint = np.zeros((layers, experts, experts), dtype=np.int64)
        self.top_pairs = np.zeros((layers, experts, experts), dtype=np.int64)
        self.layer_steps = np.zeros((max(layers - 1, 0), experts, experts), dtype=np.int64)
        self.token_steps = np.zeros((layers, experts, experts), dtype=np.int64)
        self.first_usage = np.zeros((layers, experts), dtype=np.int64)
        self.overlap = np.zeros(layers)
        self.overlap_tokens = 0
        self.router_entropy = np.zeros(layers)
        self.probability = np.zeros((layers, experts))
        self.similarity = np.zeros((layers, experts, experts))
        self.entropy_tokens = 0
        self.part_usage = np.zeros((NUM_PARTS, layers, experts), dtype=np.int64)
        self.period_usage = np.zeros((NUM_PERIODS, layers, experts), dtype=np.int64)
        self.max_token_rows = max(_MAX_TOKEN_CELLS // (layers * experts), 1)
        self.token_rows: dict[int, int] = {}
        self.token_usage = np.zeros((layers, 0, experts), dtype=np.int32)
        self.reuse = ReuseCounts(layers, experts, shape.top_k)

    def add(self, batch: TraceBatch) -> None:
        """Count one batch of whole samples with all layers."""
        ids = batch.topk_ids.astype(np.int64)  # [T, L, k]
        dataset = int(batch.dataset[0])
        same_sample = batch.sample_id[1:] == batch.sample_id[:-1]
        part = np.minimum(batch.position.astype(np.int64) * NUM_PARTS // self.window, NUM_PARTS - 1)
        period = batch.sample_id.astype(np.int64) * NUM_PERIODS // max(self.num_samples, 1)
        period = np.minimum(period, NUM_PERIODS - 1)
        self.tokens[dataset] += len(ids)
        self.samples[dataset] += batch.num_samples
        self.overlap_tokens += int(same_sample.sum())
        self._count_token_ids(batch.token_id, ids)
        self.reuse.add(batch.topk_ids)
        for layer_idx in range(self.shape.num_moe_layers):
            self._count_layer(layer_idx, ids, dataset, same_sample=same_sample)
            self._count_drift(layer_idx, ids[:, layer_idx], part=part, period=period)
        if batch.coded_log_probs is not None:
            self._count_probabilities(batch.log_probs())

    def _count_layer(
        self, layer_idx: int, ids: np.ndarray, dataset: int, *, same_sample: np.ndarray
    ) -> None:
        experts = self.shape.num_experts
        here = ids[:, layer_idx]
        chosen = np.zeros((len(here), experts), dtype=np.float32)
        np.put_along_axis(chosen, here, 1, axis=1)
        self.usage[dataset, layer_idx] += np.bincount(here.reshape(-1), minlength=experts)
        # Exact: sums of at most a batch of ones stay far below 2^24.
        self.joint[layer_idx] += (chosen.T @ chosen).astype(np.int64)
        shared = (chosen[1:] * chosen[:-1]).sum(axis=1)
        self.overlap[layer_idx] += shared[same_sample].sum()
        first = here[:, 0]
        self.first_usage[layer_idx] += np.bincount(first, minlength=experts)
        self.token_steps[layer_idx] += _pair_counts(
            first[:-1][same_sample], first[1:][same_sample], experts
        )
        if here.shape[1] > 1:
            pairs = np.sort(here[:, :2], axis=1)
            counted = _pair_counts(pairs[:, 0], pairs[:, 1], experts)
            self.top_pairs[layer_idx] += counted
            self.top_pairs_by_dataset[dataset, layer_idx] |= counted.reshape(-1) > 0
        if layer_idx + 1 < self.shape.num_moe_layers:
            self.layer_steps[layer_idx] += _pair_counts(first, ids[:, layer_idx + 1, 0], experts)

    def _count_drift(
        self, layer_idx: int, here: np.ndarray, *, part: np.ndarray, period: np.ndarray
    ) -> None:
        experts = self.shape.num_experts
        for counts, place in ((self.part_usage, part), (self.period_usage, period)):
            keys = (place[:, None] * experts + here).reshape(-1)
            found = np.bincount(keys, minlength=len(counts) * experts)
            counts[:, layer_idx] += found.reshape(len(counts), experts)

    def _count_token_ids(self, token_id: np.ndarray, ids: np.ndarray) -> None:
        distinct, rows = np.unique(token_id, return_inverse=True)
        known = np.empty(len(distinct), dtype=np.int64)
        for place, token in enumerate(distinct.tolist()):
            row = self.token_rows.get(token, -1)
            if row < 0 and len(self.token_rows) < self.max_token_rows:
                row = self.token_rows[token] = len(self.token_rows)
            known[place] = row
        layers, held, experts = self.token_usage.shape
        if len(self.token_rows) > held:
            wanted = min(max(2 * held, len(self.token_rows)), self.max_token_rows)
            grown = np.zeros((layers, wanted, experts), dtype=np.int32)
            grown[:, :held] = self.token_usage
            self.token_usage = grown
        row = known[rows]
        counted = row >= 0
        rows_here, where = np.unique(row[counted], return_inverse=True)
        for layer_idx in range(layers):
            keys = (where[:, None] * experts + ids[counted, layer_idx]).reshape(-1)
            found = np.bincount(keys, minlength=len(rows_here) * experts)
            self.token_usage[layer_idx, rows_here] += found.reshape(-1, experts).astype(np.int32)

    def _count_probabilities(self, log_probs: np.ndarray) -> None:
        probability = shares(np.exp(log_probs))
        logs = np.log2(np.maximum(probability, 1e-30))
        self.router_entropy -= (probability * logs).sum(axis=2).sum(axis=0)
        self.probability += probability.sum(axis=0)
        for layer_idx in range(self.shape.num_moe_layers):
            here = probability[:, layer_idx]
            self.similarity[layer_idx] += here.T @ here
        self.entropy_tokens += len(probability)


def _pair_counts(first: np.ndarray, second: np.ndarray, experts: int) -> np.ndarray:
    return np.bincount(first * experts + second, minlength=experts**2).reshape(experts, experts)
