"""Eviction policies: which resident expert leaves when a slot is needed.

Pure bookkeeping over keys. A policy never sees slots, pins or bytes: the cache tells it which
experts may go.
"""

import heapq
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ...collect.schema import ExpertKey, ModelShape
from ..errors import UsageError

if TYPE_CHECKING:
    from ...predictors.base import Forecast

logger = logging.getLogger(__name__)

Evictable = Callable[[ExpertKey], bool]

HALF_LIFE_TOKENS = 64
"""Tokens after which a use counts half in the decayed frequencies: a paragraph, not a document."""

FEW = 16
"""Keys up to which a ranking is looked through."""

WARMUP_TOKENS = 128
"""Tokens that `static` counts before it fixes the hot set."""

DEFAULT_EVICTION = "layer-ucp"
"""Where nothing is forecast. Misses as layer-lfu, or fewer where budgets are large or layers
differ; like it unable to collapse below one step's working set (bench/LOG.md, 2026-11-27)."""


class EvictionPolicy(Protocol):
    """Orders the experts that hold slots. Called by one ExpertCache only; never blocks.

    `wants_forecasts`: forecasts make a difference to it, so that they are worth their time even
    where nothing is read ahead.
    """

    wants_forecasts: bool

    def admit(self, key: ExpertKey) -> None:
        """`key` holds a slot from now on (its copy may still be under way)."""
        ...

    def touch(self, key: ExpertKey) -> None:
        """`key` was used in a step, whether it holds a slot or not."""
        ...

    def discard(self, key: ExpertKey) -> None:
        """`key` holds its slot no longer."""
        ...

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        """The expert that should make room for `incoming`; changes nothing.

        Only keys for which `evictable` is true; None exactly if there is no such key.
        """
        ...

    def foresee(self, forecast: "Forecast") -> None:
        """A forecast that is well-formed: the newest for its layers and step."""
        ...

    def advance(self, step: int, layer_idx: int) -> None:
        """Execution stands at this layer of this step; -1 is before the first."""
        ...

    def worth(self, key: ExpertKey) -> float:
        """Chance of a use of `key`, a later one counting less; 0 where nothing tells."""
        ...


class LookBack:
    """What a policy does with forecasts that it has no use for: nothing."""

    wants_forecasts = False

    def foresee(self, forecast: "Forecast") -> None:
        """Ignored."""

    def advance(self, step: int, layer_idx: int) -> None:
        """Ignored."""

    def worth(self, key: ExpertKey) -> float:
        """0: what was is no chance of what will be."""
        return 0.0


class Ranking(Protocol):
    """An order of keys from the first to leave to the last."""

    def add(self, key: ExpertKey) -> None: ...

    def touch(self, key: ExpertKey) -> None: ...

    def discard(self, key: ExpertKey) -> None: ...

    def first(self, evictable: Evictable) -> ExpertKey | None: ...

    def __len__(self) -> int: ...


class RecencyRanking:
    """Least recently admitted or used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def add(self, key: ExpertKey) -> None:
        self._order[key] = None

    def touch(self, key: ExpertKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def discard(self, key: ExpertKey) -> None:
        self._order.pop(key, None)

    def first(self, evictable: Evictable) -> ExpertKey | None:
        return next(filter(evictable, self._order), None)


class FrequencyRanking:
    """Least exponentially decayed count of uses first; counts outlive residency.

    Each layer has its own clock, one tick a use, and a use weighs 2^(ticks / half_life) when it is
    made: weights then grow instead of decaying, so the order of two keys changes only by uses and
    a heap stays valid. Weights are kept as base-2 logarithms, which cannot overflow. The heap
    holds lower bounds that are corrected when they reach the top: O(log n) a use, amortised.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._clock: dict[int, int] = {}
        self._weight: dict[ExpertKey, float] = {}
        self._heap: list[tuple[float, ExpertKey]] = []
        self._members: set[ExpertKey] = set()
        self._queued: set[ExpertKey] = set()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def weights(self) -> Mapping[ExpertKey, float]:
        """`weight` of every key that was used; a view."""
        return self._weight

    def weight(self, key: ExpertKey) -> float:
        """log2 of the decayed count, on a scale common to all keys; -inf if never used."""
        return self._weight.get(key, -math.inf)

    def add(self, key: ExpertKey) -> None:
        self._members.add(key)
        if key not in self._queued:
            self._queued.add(key)
            heapq.heappush(self._heap, (self.weight(key), key))

    def touch(self, key: ExpertKey) -> None:
        tick = self._clock.get(key.layer_idx, 0) + 1
        self._clock[key.layer_idx] = tick
        use = tick / self._half_life
        old = self._weight.get(key, -math.inf)
        high, low = (old, use) if old > use else (use, old)
        self._weight[key] = high + math.log2(1.0 + 2.0 ** (low - high))

    def discard(self, key: ExpertKey) -> None:
        self._members.discard(key)

    def first(self, evictable: Evictable) -> ExpertKey | None:
        heap, members, weights = self._heap, self._members, self._weight
        if len(members) <= FEW:
            return self._first_of_few(evictable)
        passed: list[tuple[float, ExpertKey]] = []
        found = None
        while heap:
            bound, key = heap[0]
            if key not in members:
                heapq.heappop(heap)
                self._queued.discard(key)
            elif bound < (weight := weights.get(key, -math.inf)):
                heapq.heapreplace(heap, (weight, key))
            elif evictable(key):
                found = key
                break
            else:
                passed.append(heapq.heappop(heap))
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

    def _first_of_few(self, evictable: Evictable) -> ExpertKey | None:
        # Often asked where nothing may go: passing all by is then cheaper than a heap's order.
        weights, least, found = self._weight, math.inf, None
        for key in self._members:
            weight = weights.get(key, -math.inf)
            if weight > least or (weight == least and found is not None and key > found):
                continue
            if evictable(key):
                least, found = weight, key
        return found


def _half_life(shape: ModelShape) -> float:
    return float(HALF_LIFE_TOKENS * shape.top_k)


class GlobalEviction(LookBack):
    """One ranking over all layers' experts."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking

    def admit(self, key: ExpertKey) -> None:
        self._ranking.add(key)

    def touch(self, key: ExpertKey) -> None:
        self._ranking.touch(key)

    def discard(self, key: ExpertKey) -> None:
        self._ranking.discard(key)

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        return self._ranking.first(evictable)


class LruEviction(GlobalEviction):
    """Least recently used of all layers. Hits nothing below one step's working set."""

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        super().__init__(RecencyRanking())


class LfuEviction(GlobalEviction):
    """Least decayed frequency of all layers."""

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        super().__init__(FrequencyRanking(_half_life(shape)))


class LayerEviction(LookBack):
    """A ranking and a quota of slots for each layer; free slots may be borrowed beyond the quota.

    A layer at its quota replaces its own experts; one below it takes a slot back from the layer
    that is most above. If pins leave nothing there, any layer's expert may go.
    """

    def __init__(self, rankings: Sequence[Ranking], num_slots: int) -> None:
        layers = len(rankings)
        self._rankings = rankings
        self._quotas = [
            (layer + 1) * num_slots // layers - layer * num_slots // layers
            for layer in range(layers)
        ]

    def admit(self, key: ExpertKey) -> None:
        self._rankings[key.layer_idx].add(key)

    def touch(self, key: ExpertKey) -> None:
        self._rankings[key.layer_idx].touch(key)

    def discard(self, key: ExpertKey) -> None:
        self._rankings[key.layer_idx].discard(key)

    def _excess(self, layer_idx: int) -> int:
        return len(self._rankings[layer_idx]) - self._quotas[layer_idx]

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        own = incoming.layer_idx
        if self._excess(own) >= 0:
            key = self._rankings[own].first(evictable)
            if key is not None:
                return key
        layers = sorted(range(len(self._rankings)), key=self._excess, reverse=True)
        for layer_idx in layers:
            key = self._rankings[layer_idx].first(evictable)
            if key is not None:
                return key
        return None


class LayerLruEviction(LayerEviction):
    """Least recently used, a quota of slots for each layer."""

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        super().__init__([RecencyRanking() for _ in range(shape.num_moe_layers)], num_slots)


class LayerLfuEviction(LayerEviction):
    """Least decayed frequency, a quota of slots for each layer."""

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        half_life = _half_life(shape)
        super().__init__(
            [FrequencyRanking(half_life) for _ in range(shape.num_moe_layers)], num_slots
        )


class StaticEviction(LookBack):
    """Counts for WARMUP_TOKENS tokens, then keeps the most used experts for good.

    The hot set leaves one step's top_k slots (at most half of all) for the experts outside it,
    which replace each other by recency. A hot expert goes only where nothing else may.
    """

    def __init__(self, shape: ModelShape, num_slots: int) -> None:
        self._counts = FrequencyRanking(math.inf)
        # Of all experts while counting, then of those outside of the hot set.
        self._recency = RecencyRanking()
        self._uses: dict[ExpertKey, int] = {}
        self._warmup = WARMUP_TOKENS * shape.top_k * shape.num_moe_layers
        self._hot_slots = num_slots - min(shape.top_k, (num_slots + 1) // 2)
        self._hot: frozenset[ExpertKey] = frozenset()

    def admit(self, key: ExpertKey) -> None:
        self._counts.add(key)
        if key not in self._hot:
            self._recency.add(key)

    def touch(self, key: ExpertKey) -> None:
        self._recency.touch(key)
        if self._warmup > 0:
            self._warmup -= 1
            self._counts.touch(key)
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._warmup == 0:
                ranked = sorted(self._uses, key=lambda key: (-self._uses[key], key))
                self._hot = frozenset(ranked[: self._hot_slots])
                for hot in self._hot:
                    self._recency.discard(hot)

    def discard(self, key: ExpertKey) -> None:
        self._counts.discard(key)
        self._recency.discard(key)

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        if self._hot:
            key = self._recency.first(evictable)
            if key is not None:
                return key
        return self._counts.first(evictable)


def _forecast(shape: ModelShape, num_slots: int) -> EvictionPolicy:
    # Imported when asked for: it brings numpy, which the command line does without.
    from .foresight import ForecastEviction

    return ForecastEviction(shape, num_slots)


def _layer_ucp(shape: ModelShape, num_slots: int) -> EvictionPolicy:
    from .partition import LayerUcpEviction

    return LayerUcpEviction(shape, num_slots)


EVICTIONS: dict[str, Callable[[ModelShape, int], EvictionPolicy]] = {
    "forecast": _forecast,
    "layer-lfu": LayerLfuEviction,
    "layer-lru": LayerLruEviction,
    "layer-ucp": _layer_ucp,
    "lfu": LfuEviction,
    "lru": LruEviction,
    "static": StaticEviction,
}


def make_eviction(name: str, *, shape: ModelShape, num_slots: int) -> EvictionPolicy:
    """The policy called `name` for a cache of `num_slots`; UsageError lists the known names.

    A global LRU that holds less than one step's working set evicts each expert before its layer
    comes round again: it is replaced by the per-layer form, and a warning says so.
    """
    if name not in EVICTIONS:
        raise UsageError(f"eviction policy {name!r} is unknown; known ones: {', '.join(EVICTIONS)}")
    working_set = shape.num_moe_layers * shape.top_k
    if name == "lru" and num_slots < working_set:
        logger.warning(
            "%d expert slots are fewer than the %d experts of one token (%d layers x top %d): "
            "a global lru would hit nothing, using layer-lru",
            num_slots,
            working_set,
            shape.num_moe_layers,
            shape.top_k,
        )
        name = "layer-lru"
    return EVICTIONS[name](shape, num_slots)
