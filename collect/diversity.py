"""Running figures of expert use, cheap enough for every batch: coverage, pairs, entropy,
extremes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .schema import ModelShape


@dataclass(frozen=True, slots=True)
class DiversitySummary:
    """Of one data set or all: coverage is the mean over layers, entropies in bits, experts as
    (layer, id).

    `unique_pairs` counts distinct unordered pairs of the two largest weights per layer, summed over
    layers. `most_used` and `least_used` are (layer, expert, share of that layer's tokens).
    """

    tokens: int
    coverage: float
    unique_pairs: int
    routing_entropy: float
    experts_per_layer: float
    experts_used: int
    most_used: tuple[int, int, float]
    least_used: tuple[int, int, float]


class Diversity:
    """Counts of expert use that grow with each batch of top-k ids; adds up by `merge`."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._usage = np.zeros((shape.num_moe_layers, shape.num_experts), dtype=np.int64)
        self._pairs = np.zeros((shape.num_moe_layers, shape.num_experts**2), dtype=bool)
        self._tokens = 0

    @property
    def coverage(self) -> float:
        """Share of experts used so far, mean over layers."""
        return float((self._usage > 0).mean())

    def add(self, topk_ids: np.ndarray) -> None:
        """Count tokens' experts [T, L * k] or [T, L, k], ordered by weight."""
        layers, experts = self._usage.shape
        ids = topk_ids.reshape(len(topk_ids), layers, -1).astype(np.int64)
        keys = ids + np.arange(layers)[:, None] * experts
        self._usage += np.bincount(keys.ravel(), minlength=layers * experts).reshape(
            layers, experts
        )
        if ids.shape[2] > 1:
            low, high = ids[:, :, :2].min(axis=2), ids[:, :, :2].max(axis=2)
            self._pairs[np.arange(layers), low * experts + high] = True
        self._tokens += len(ids)

    def merge(self, other: Diversity) -> None:
        """Add what another one counted."""
        self._usage += other._usage
        self._pairs |= other._pairs
        self._tokens += other._tokens

    def summary(self) -> DiversitySummary:
        """The figures so far; zeros where nothing was counted."""
        total = self._usage.sum(axis=1, keepdims=True)
        share = self._usage / np.maximum(total, 1)
        logs = np.log2(share, where=share > 0, out=np.zeros_like(share))
        used = (self._usage > 0).sum(axis=1)
        return DiversitySummary(
            tokens=self._tokens,
            coverage=self.coverage,
            unique_pairs=int(self._pairs.sum()),
            routing_entropy=float(-(share * logs).sum(axis=1).mean()),
            experts_per_layer=float(used.mean()),
            experts_used=int(used.sum()),
            most_used=self._extreme(int(self._usage.argmax())),
            least_used=self._extreme(int(self._usage.argmin())),
        )

    def _extreme(self, flat: int) -> tuple[int, int, float]:
        layer_idx, expert_idx = divmod(flat, self._usage.shape[1])
        share = self._usage[layer_idx, expert_idx] / max(self._tokens, 1)
        return layer_idx, expert_idx, float(share)
