"""How long experts stay unused, and what an LRU cache of every size would have hit: Mattson's
stack.

A look-up hits in a least-recently-used cache of S slots exactly when its stack depth is at most S,
so one pass gives the hit rate at every size (R. L. Mattson and others, 1970).
"""

from __future__ import annotations

import numpy as np

_CELLS = 1 << 21


class StackDepths:
    """Depths of a stream of steps that each ask for A distinct keys of `num_keys`, in order."""

    def __init__(self, num_keys: int) -> None:
        self._num_keys = num_keys
        self._last = np.full(num_keys, -1, dtype=np.int64)
        self._clock = 0

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Depths [T, A] of the next T steps' keys [T, A]: 1 = the key used just before, ...

        `num_keys + 1` for the first use of a key, which no cache hits. Keys of one step must
        differ.
        """
        depths = np.empty(keys.shape, dtype=np.int32)
        steps = max(_CELLS // max(self._num_keys, keys.shape[1] ** 2), 1)
        for start in range(0, len(keys), steps):
            depths[start : start + steps] = self._chunk(
                keys[start : start + steps].astype(np.int64)
            )
        return depths

    def _chunk(self, keys: np.ndarray) -> np.ndarray:
        steps, asked = keys.shape
        times = self._clock + np.arange(steps * asked).reshape(steps, asked)
        seen = np.full((steps + 1, self._num_keys), -1, dtype=np.int64)
        seen[0] = self._last
        seen[np.arange(1, steps + 1)[:, None], keys] = times
        np.maximum.accumulate(seen, axis=0, out=seen)
        before, self._last = seen[:-1], seen[-1].copy()
        self._clock += steps * asked
        previous = np.take_along_axis(before, keys, axis=1)  # [T, A] time of last use, -1 never
        # One search over all rows: row numbers keep their times apart.
        rows = np.arange(steps)[:, None] * (self._clock + 2)
        ordered = (np.sort(before, axis=1) + rows).reshape(-1)
        not_later = np.searchsorted(ordered, previous + rows, side="right")
        later = self._num_keys - (not_later - np.arange(steps)[:, None] * self._num_keys)
        # Of this step's own earlier keys, those last used before count too; the others are in
        # `later`.
        earlier = np.tri(asked, k=-1, dtype=bool)[None]  # [1, A, A]: i < j at [j, i]
        fresh = (previous[:, None, :] < previous[:, :, None]) & earlier
        depths = later + fresh.sum(axis=2) + 1
        return np.where(previous < 0, self._num_keys + 1, depths)


class ReuseCounts:
    """Depth histograms of each layer's own cache and of one cache for all layers, and gaps in
    tokens.

    The cache for all layers costs more to follow; it is fed the first `max_global_steps` tokens
    only.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._num_experts = num_experts
        self._layers = [StackDepths(num_experts) for _ in range(num_layers)]
        self._all = StackDepths(num_layers * num_experts)
        self._last_token = np.full((num_layers, num_experts), -1, dtype=np.int64)
        cost = num_layers * num_experts * 10 + (num_layers * top_k) ** 2
        self.max_global_steps = int(4e9) // cost
        self.tokens = 0
        self.global_steps = 0
        self.layer_depths = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
        self.global_depths = np.zeros(num_layers * num_experts + 2, dtype=np.int64)
        # Gap g lies in bin floor(log2 g); 1 token is bin 0.
        self.gaps = np.zeros((num_layers, 40), dtype=np.int64)
        self.gap_sums = np.zeros(num_layers, dtype=np.float64)

    def add(self, topk_ids: np.ndarray) -> None:
        """Count the next tokens' experts [T, L, k], one decode step a token."""
        steps, num_layers, _ = topk_ids.shape
        for layer_idx, stack in enumerate(self._layers):
            ids = topk_ids[:, layer_idx]
            depths = stack.add(ids)
            self.layer_depths[layer_idx] += np.bincount(
                depths.reshape(-1), minlength=self._num_experts + 2
            )
            self._count_gaps(layer_idx, ids)
        left = self.max_global_steps - self.global_steps
        if left > 0:
            keys = topk_ids[:left].astype(np.int64)
            keys = keys + np.arange(num_layers)[:, None] * self._num_experts
            depths = self._all.add(keys.reshape(len(keys), -1))
            self.global_depths += np.bincount(depths.reshape(-1), minlength=len(self.global_depths))
            self.global_steps += len(keys)
        self.tokens += steps

    def _count_gaps(self, layer_idx: int, ids: np.ndarray) -> None:
        steps = self.tokens + np.repeat(np.arange(len(ids)), ids.shape[1])
        order = np.argsort(ids.reshape(-1), kind="stable")
        experts, times = ids.reshape(-1)[order], steps[order]
        first = np.r_[True, experts[1:] != experts[:-1]]
        before = np.r_[0, times[:-1]]
        before[first] = self._last_token[layer_idx, experts[first]]
        self._last_token[layer_idx, experts[np.r_[first[1:], True]]] = times[np.r_[first[1:], True]]
        gaps = (times - before)[before >= 0]
        if len(gaps):
            bins = np.floor(np.log2(gaps)).astype(np.int64)
            self.gaps[layer_idx] += np.bincount(bins, minlength=self.gaps.shape[1])
            self.gap_sums[layer_idx] += gaps.sum()


def hit_rates(depths: np.ndarray) -> np.ndarray:
    """Hit rate of a cache with 0, 1, ..., N slots from a histogram of depths; first uses are
    misses.
    """
    total = depths.sum(axis=-1, keepdims=True)
    return np.cumsum(depths[..., :-1], axis=-1) / np.where(total == 0, 1, total)
