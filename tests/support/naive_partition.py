"""Quotas of `layer-ucp` by their definition, from the history of uses, without its structures."""

import math
from collections import defaultdict
from itertools import combinations, pairwise

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.experts.eviction import HALF_LIFE_TOKENS
from outrider.runtime.experts.partition import (
    DEVIATIONS,
    LEAST_PASSES,
    MEASURED_EVERY,
    NEEDED_PASSES,
    UTILITY_HALF_LIFE_TOKENS,
    WINDOW_SHARE,
)


class NaivePartition:
    """`quotas` after every `use`; everything that they follow from is recomputed each time."""

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        layers = shape.num_moe_layers
        self.shape = shape
        self.is_fixed = layers == 1 or num_slots >= layers * shape.num_experts
        ends = [layer_idx * num_slots // layers for layer_idx in range(layers + 1)]
        self.quotas = [end - start for start, end in pairwise(ends)]
        self.even = tuple(self.quotas)
        # Per layer: decayed counts as of its last use; of each measured pass the rank of each use,
        # None for a first one.
        self.counts: dict[int, dict[ExpertKey, float]] = defaultdict(dict)
        self.passes: dict[int, list[list[int | None]]] = defaultdict(list)
        self.layer_idx = -1
        self.before: dict[ExpertKey, float] = {}
        self.ranks: list[int | None] = []
        self.num_passes = 0
        # A comparison was so close that rounding decides it; what follows may differ.
        self.is_close = False

    def use(self, key: ExpertKey) -> None:
        if key.layer_idx != self.layer_idx:
            self.begin_pass(key.layer_idx)
        counts = self.counts[key.layer_idx]
        mine = counts.get(key)
        rank = None if mine is None else sum(count > mine for count in self.before.values())
        self.ranks.append(rank)
        faded = 2.0 ** (-1.0 / (HALF_LIFE_TOKENS * self.shape.top_k))
        for one in (counts, self.before):
            one.update({key: count * faded for key, count in one.items()})
        counts[key] = counts.get(key, 0.0) + 1.0

    def begin_pass(self, layer_idx: int) -> None:
        """Every MEASURED_EVERY-th pass through all layers counts."""
        layers = self.shape.num_moe_layers
        if self.num_passes and (self.num_passes - 1) // layers % MEASURED_EVERY == 0:
            self.passes[self.layer_idx].append(self.ranks)
        if self.num_passes % (MEASURED_EVERY * layers) == 0 and not self.is_fixed:
            self.rebalance()
        self.num_passes += 1
        self.layer_idx, self.ranks = layer_idx, []
        self.before = dict(self.counts[layer_idx])

    def uses(self, layer_idx: int, start: int, end: int) -> float:
        """Decayed uses at ranks from `start` to `end`, as if of a whole window."""
        window = max(1, self.shape.num_experts // WINDOW_SHARE)
        inside = set(range(start, end)) & set(range(self.shape.num_experts))
        if not inside:
            return 0.0
        half_life = UTILITY_HALF_LIFE_TOKENS * self.shape.top_k / MEASURED_EVERY
        age, total = 0, 0.0
        for ranks in reversed(self.passes[layer_idx]):
            for rank in reversed(ranks):
                total += 2.0 ** (-age / half_life) * (rank in inside)
                age += 1
        return total * window / len(inside)

    def fewest(self, layer_idx: int) -> int:
        needed = 0.0
        for ranks in self.passes[layer_idx]:
            needed += (len(ranks) - needed) / NEEDED_PASSES
        enough = (
            LEAST_PASSES * count
            for count in range(self.shape.num_experts + 1)
            if count >= max(needed, self.shape.top_k)
        )
        return min(self.even[layer_idx], next(enough, self.even[layer_idx]))

    def rebalance(self) -> None:
        layers = range(self.shape.num_moe_layers)
        window = max(1, self.shape.num_experts // WINDOW_SHARE)
        quotas = self.quotas
        gain = [self.uses(one, quotas[one], quotas[one] + window) for one in layers]
        loss = [self.uses(one, quotas[one] - window, quotas[one]) for one in layers]
        is_starved = [quotas[one] < self.fewest(one) for one in layers]
        self.is_close |= any(
            _is_close(*pair) for uses in (gain, loss) for pair in combinations(uses, 2)
        )
        takers = sorted(
            (one for one in layers if quotas[one] < self.shape.num_experts),
            key=lambda one: (not is_starved[one], 0.0 if is_starved[one] else -gain[one], one),
        )
        givers = sorted(
            (one for one in layers if quotas[one] > self.fewest(one)),
            key=lambda one: (loss[one], one),
        )
        moved: list[int] = []
        for taker, giver in zip(takers, givers, strict=False):
            lead = gain[taker] - loss[giver]
            noise = DEVIATIONS * ((gain[taker] + loss[giver]) / 2.0) ** 0.5
            self.is_close |= _is_close(lead, noise)
            if taker == giver or taker in moved or giver in moved:
                break
            if not is_starved[taker] and lead <= noise:
                break
            quotas[taker] += 1
            quotas[giver] -= 1
            moved += [taker, giver]


def _is_close(left: float, right: float) -> bool:
    return left != 0.0 and math.isclose(left, right, rel_tol=1e-9)
