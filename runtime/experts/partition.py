"""Which layer gets how many slots: `layer-ucp`, layer-lfu whose quotas follow measured gain.

Bookkeeping over keys, as in `eviction`, which names this policy.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable

from ...collect.schema import ExpertKey, ModelShape
from .eviction import HALF_LIFE_TOKENS, FrequencyRanking, LayerEviction

UTILITY_HALF_LIFE_TOKENS = 8 * HALF_LIFE_TOKENS
"""For uses by rank. By replay (bench/LOG.md, 2026-11-27) 100 to 1000 tokens gain alike; shorter
ones lose a little where there is nothing to gain."""

MEASURED_EVERY = 4
"""Passes of which one is measured, after which quotas may change, no layer's by more than a slot.
Monitors that sample see enough, at a quarter of the time."""

WINDOW_SHARE = 16
"""Ranks that are taken together, as a part of a layer's experts: single ones are noise."""

DEVIATIONS = 2.0
"""Standard deviations by which the gain of one layer must be ahead of the loss of another."""

LEAST_PASSES = 2
"""Passes whose experts a layer keeps slots for, if an even share has so many: what one pass needs
goes through them whatever its frequency, and ranks speak of the slots beyond."""

NEEDED_PASSES = 16
"""Measured passes over which the number of experts that one needs is averaged."""

_MAX_UNIT = 1e100


class LayerUtility:
    """What slots of one layer are worth: its uses, by how many experts were more frequent.

    Uses at rank r are what the slot number r + 1 is good for, whatever is resident: the stack
    distances of Mattson et al. (1970), with decayed frequency for the order of the stack, as the
    sampling utility monitors of Qureshi and Patt's utility-based cache partitioning (MICRO 2006)
    have them. Ranks are those before the pass; a first use says nothing about any size. Older uses
    weigh less: a new one weighs growth^n after n uses.
    """

    def __init__(self, num_experts: int, *, half_life: float) -> None:
        self._window = max(1, num_experts // WINDOW_SHARE)
        self._growth = 2.0 ** (1.0 / half_life)
        self._unit = 1.0
        self._by_rank = [0.0] * num_experts
        # Frequencies before the pass that is measured, ascending.
        self._order: list[float] = []
        self.num_needed = 0.0
        """Experts of one pass, a decayed mean."""

    def begin(self, frequencies: Iterable[float]) -> None:
        """A pass that is measured begins, with these frequencies of all experts used before."""
        self._order = sorted(frequencies)
        if self._unit > _MAX_UNIT:
            self._by_rank = [uses / self._unit for uses in self._by_rank]
            self._unit = 1.0

    def count(self, frequency: float) -> None:
        """The pass uses an expert of this frequency, -inf if never used before."""
        order = self._order
        self._unit *= self._growth
        if frequency > -math.inf:
            self._by_rank[len(order) - bisect_right(order, frequency)] += self._unit

    def end(self, num_needed: int) -> None:
        """The pass needed so many experts."""
        self.num_needed += (num_needed - self.num_needed) / NEEDED_PASSES

    def gain(self, num_slots: int) -> float:
        """Decayed count of the uses that slots beyond `num_slots` would have served, of as many
        slots as `loss` speaks of.
        """
        return self._uses(num_slots, num_slots + self._window)

    def loss(self, num_slots: int) -> float:
        """Decayed count of the uses that the last of `num_slots` slots have served."""
        return self._uses(max(0, num_slots - self._window), num_slots)

    def _uses(self, start: int, end: int) -> float:
        ranks = self._by_rank[start:end]
        if not ranks:
            return 0.0
        # At either end there are fewer ranks: their mean is taken for the others.
        return sum(ranks) / self._unit * self._window / len(ranks)


class LayerUcpEviction(LayerEviction):
    """Least decayed frequency; slots are moved to the layers in which they serve the most uses.

    Quotas begin even. Every few passes the layer that would gain most by a slot takes one from the
    layer that would lose least, the second from the second, and so on, while gain is ahead of loss
    by DEVIATIONS: counts that differ less, differ by chance. A layer keeps slots for LEAST_PASSES,
    up to an even share. A use costs a logarithm, a measured pass a sort of its layer.
    """

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        layers = shape.num_moe_layers
        half_life = float(HALF_LIFE_TOKENS * shape.top_k)
        self._frequencies = [FrequencyRanking(half_life) for _ in range(layers)]
        super().__init__(self._frequencies, num_slots)
        self._shape = shape
        self._even = self.quotas
        self._utilities = [
            LayerUtility(
                shape.num_experts, half_life=UTILITY_HALF_LIFE_TOKENS * shape.top_k / MEASURED_EVERY
            )
            for _ in range(layers)
        ]
        # With a single layer, or slots for all experts, there is nothing to decide.
        self._is_measuring = layers > 1 and num_slots < layers * shape.num_experts
        # The pass through one layer: how many uses so far, None if it is not measured.
        self._pass_layer_idx = -1
        self._num_used: int | None = None
        self._num_passes = 0

    @property
    def quotas(self) -> tuple[int, ...]:
        """Slots of each layer, all of them in sum."""
        return tuple(self._quotas)

    def touch(self, key: ExpertKey) -> None:
        layer_idx = key.layer_idx
        ranking = self._frequencies[layer_idx]
        if layer_idx != self._pass_layer_idx and self._is_measuring:
            self._begin_pass(layer_idx)
        if self._num_used is not None:
            self._utilities[layer_idx].count(ranking.weight(key))
            self._num_used += 1
        ranking.touch(key)

    def _begin_pass(self, layer_idx: int) -> None:
        if self._num_used is not None:
            self._utilities[self._pass_layer_idx].end(self._num_used)
            self._num_used = None
        self._pass_layer_idx = layer_idx
        place = self._num_passes % (MEASURED_EVERY * len(self._quotas))
        self._num_passes += 1
        if place == 0:
            self._rebalance()
        if place < len(self._quotas):
            self._utilities[layer_idx].begin(self._frequencies[layer_idx].weights.values())
            self._num_used = 0

    def _fewest(self, layer_idx: int) -> int:
        needed = max(self._shape.top_k, math.ceil(self._utilities[layer_idx].num_needed))
        return min(LEAST_PASSES * needed, self._even[layer_idx])

    def _rebalance(self) -> None:
        quotas, utilities = self._quotas, self._utilities
        layers = range(len(quotas))
        fewest = [self._fewest(one) for one in layers]
        gains = [
            math.inf if quotas[one] < fewest[one] else utilities[one].gain(quotas[one])
            for one in layers
        ]
        losses = [utilities[one].loss(quotas[one]) for one in layers]
        takers = sorted(
            (one for one in layers if quotas[one] < self._shape.num_experts),
            key=lambda one: (-gains[one], one),
        )
        givers = sorted(
            (one for one in layers if quotas[one] > fewest[one]),
            key=lambda one: (losses[one], one),
        )
        moved: set[int] = set()
        for taker, giver in zip(takers, givers, strict=False):
            gain, loss = gains[taker], losses[giver]
            # Half of a decayed count is its variance, if uses come by chance.
            noise = math.sqrt((gain + loss) / 2.0)
            is_clear = gain == math.inf or gain - loss > DEVIATIONS * noise
            if taker == giver or {taker, giver} & moved or not is_clear:
                return
            moved |= {taker, giver}
            quotas[taker] += 1
            quotas[giver] -= 1
