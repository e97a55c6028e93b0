"""Eviction by what is to come: `forecast` weighs forecasts, `belady` is told the future.

Bookkeeping over keys, as in `eviction`, which names these policies; apart from it since they need
numpy, which the command line does without.
"""

import heapq
from collections import deque
from collections.abc import Iterable

import numpy as np

from ...collect.schema import ExpertKey, ModelShape
from ...predictors.base import Forecast
from .decisions import Decisions
from .eviction import Evictable, LookBack
from .partition import LayerUcpEviction

DISCOUNT = 0.6
"""What a use one token later is worth: a slot kept for it could have served another meanwhile. By
replay (bench/LOG.md, 2026-11-26); an oracle would take 0.8, and loses 1 to 6 % of its lead."""

RATE_HALF_LIFE_TOKENS = 64
"""For what no forecast speaks of. By replay with nano's ensemble on validation and test text 32 is
as good, and 200 misses 1 to 7 % more at 25 % and above (bench/LOG.md, 2026-11-27)."""

SPARED = 0.3
"""An expert forecast for this token with this probability stays while others may go."""

SHORTLIST = 4
"""Victims ranked at once, in multiples of top_k; one layer seldom takes more."""

_MAX_INCREMENT = 1e100


class UseRates:
    """How likely each expert is used in some later step, from past uses, [num_moe_layers,
    num_experts].

    Decayed counts, in which a use weighs growth^n after n uses of its layer, so that no count has
    to be decayed: rows are scaled down long before they overflow.
    """

    def __init__(self, shape: ModelShape, *, discount: float) -> None:
        size = (shape.num_moe_layers, shape.num_experts)
        self._top_k = float(shape.top_k)
        self._discount = discount
        self._growth = 2.0 ** (1.0 / (RATE_HALF_LIFE_TOKENS * shape.top_k))
        # Lists, since a use is counted at each look-up and the whole is read once a layer.
        self._weight = [[0.0] * shape.num_experts for _ in range(shape.num_moe_layers)]
        self._increment = [1.0] * shape.num_moe_layers
        # As of the last reading, but for layers used since.
        self._rates, self._beyond = np.zeros(size), np.zeros(size)
        self._changed: set[int] = set()

    def count(self, key: ExpertKey) -> None:
        """One use of `key`, after which older ones of its layer weigh a little less."""
        layer_idx, expert_idx = key
        increment = self._increment[layer_idx] * self._growth
        if increment > _MAX_INCREMENT:
            self._weight[layer_idx] = [one / increment for one in self._weight[layer_idx]]
            increment = 1.0
        self._increment[layer_idx] = increment
        self._weight[layer_idx][expert_idx] += increment
        self._changed.add(layer_idx)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability q of a use in a step, 0 in a layer that was never used; and what uses from
        then on are worth at that rate, the sum of discount^t q (1 - q)^(t - 1). Not to be written
        to; valid until the next call.
        """
        discount = self._discount
        for layer_idx in self._changed:
            weight = np.array(self._weight[layer_idx])
            total = max(weight.sum(), 1e-300)
            rates = self._rates[layer_idx]
            np.minimum(weight * (self._top_k / total), 1.0, out=rates)
            self._beyond[layer_idx] = discount * rates / (1.0 - discount * (1.0 - rates))
        self._changed.clear()
        return self._rates, self._beyond


class ForecastEviction(LayerUcpEviction):
    """The expert whose next use is worth least leaves, whatever its layer.

    An expert's worth is the expected DISCOUNT^t of its next use t tokens from now: by the forecasts
    held for the rest of this token and for the next tokens, beyond them by decayed frequency. Slots
    go to layers by this worth alone. All worths are computed when the first victim is asked for
    after `advance`, `foresee` or a use, and an expert admitted since then is chosen last: a layer
    costs a few vector operations over all experts, each further victim O(1), amortised.
    Where no forecast reaches round to the next token, the choice is LayerUcpEviction's, of experts
    that no forecast for this token speaks of while there are such.
    """

    wants_forecasts = True

    def __init__(self, shape: ModelShape, num_slots: int, *, discount: float = DISCOUNT) -> None:
        super().__init__(shape, num_slots)
        layers, experts = shape.num_moe_layers, shape.num_experts
        self._shape = shape
        self._discount = discount
        self._uses = UseRates(shape, discount=discount)
        self._keys = [ExpertKey(*pair) for pair in np.ndindex(layers, experts)]
        self._native = Decisions.of(layers, experts)
        self._tables: dict[int, _Forecasts] = {}
        self._blank = _Forecasts(layers, experts)
        self._step, self._layer_idx = 0, -1
        self._is_member = np.zeros((layers, experts), dtype=bool)
        self._members_address = self._is_member.ctypes.data
        self._late: set[ExpertKey] = set()
        self._shortlist: deque[ExpertKey] = deque()
        self._worths: np.ndarray | None = None
        # Layers come round in order: the next one soonest, this one in a whole token.
        lags = (np.arange(layers) + 1.0) / layers
        self._nearness = [
            (discount ** np.roll(lags, split))[:, None] for split in range(layers + 1)
        ]
        self._length = SHORTLIST * shape.top_k

    def admit(self, key: ExpertKey) -> None:
        super().admit(key)
        self._is_member[key] = True
        self._late.add(key)

    def touch(self, key: ExpertKey) -> None:
        super().touch(key)
        self._uses.count(key)
        self._worths = None

    def discard(self, key: ExpertKey) -> None:
        super().discard(key)
        self._is_member[key] = False
        self._late.discard(key)

    def foresee(self, forecast: Forecast) -> None:
        """Take the newest forecast for its layers and step; one for a step gone by is ignored."""
        if forecast.step < self._step:
            return
        start, end = forecast.layer_from, forecast.layer_to
        held = self._tables.get(forecast.step)
        if held is None:
            held = self._tables[forecast.step] = _Forecasts(*self._is_member.shape)
        held.table[start:end] = forecast.probability
        held.is_known[start:end] = True
        self._worths = None

    def advance(self, step: int, layer_idx: int) -> None:
        """Execution stands at this layer. Going back to an earlier step forgets all forecasts."""
        if step != self._step:
            for gone in [one for one in self._tables if one < step or step < self._step]:
                del self._tables[gone]
        self._step, self._layer_idx = step, layer_idx
        self._worths = None

    def worths(self) -> np.ndarray | None:
        """Worth of each expert now, 0 to 1, [layers, experts]; not to be written to.

        None unless the next use of every layer is forecast.
        """
        if self._worths is None and self._is_foreseen():
            self._worths = self._compute()
            self._shortlist.clear()
        return self._worths

    def worth(self, key: ExpertKey) -> float:
        """Of one expert; 0 where `worths` are not known."""
        worths = self.worths()
        return 0.0 if worths is None else float(worths[key])

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        worths = self.worths()
        if worths is None:
            return self._spared_victim(incoming, evictable)
        if not self._shortlist:
            self._late.clear()
            self._shortlist.extend(self._least(worths, self._length))
        while self._shortlist and not self._is_member[self._shortlist[0]]:
            self._shortlist.popleft()
        for key in self._shortlist:
            if key not in self._late and self._is_member[key] and evictable(key):
                return key
        # Most that were ranked are pinned or gone: all are ranked anew, late ones with them.
        self._late.clear()
        everyone = self._least(worths, int(np.count_nonzero(self._is_member)))
        self._shortlist = deque(everyone)
        return next(filter(evictable, everyone), None)

    def _spared_victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        if self._step not in self._tables:
            return super().victim(incoming, evictable)
        table = self._tables[self._step].table
        split = self._layer_idx

        def goes(key: ExpertKey) -> bool:
            is_ahead = key.layer_idx > split and table[key] >= SPARED
            return not is_ahead and evictable(key)

        return super().victim(incoming, goes) or super().victim(incoming, evictable)

    def _is_foreseen(self) -> bool:
        if not self._tables:
            return False
        split = self._layer_idx + 1
        now = self._tables.get(self._step, self._blank)
        after = self._tables.get(self._step + 1, self._blank)
        return bool(now.is_known[split:].all() and after.is_known[:split].all())

    def _least(self, worths: np.ndarray, count: int) -> list[ExpertKey]:
        """The `count` members of least worth, ascending."""
        if self._native is not None:
            cells = self._native.least(worths, self._members_address, count)
        else:
            members = np.flatnonzero(self._is_member)
            values = worths.reshape(-1)[members]
            cells = members[values.argsort(kind="stable")[:count]].tolist()
        keys = self._keys
        return [keys[one] for one in cells]

    def _compute(self) -> np.ndarray:
        split = self._layer_idx + 1
        rates, beyond = self._uses.read()
        steps = [self._tables.get(self._step + later, self._blank) for later in range(3)]
        if self._native is not None:
            return self._native.worths(
                [one.addresses for one in steps],
                (rates, beyond),
                nearness=self._nearness[split],
                split=split,
                discount=self._discount,
            )
        now, after, last = steps
        # Layers up to this one come round in the next step; all of these rows are forecast.
        first = np.concatenate((after.table[:split], now.table[split:]), dtype=np.float64)
        # Rows of the step after that are forecast or not.
        is_known = np.concatenate((last.is_known[:split], after.is_known[split:]))[:, None]
        later = np.concatenate((last.table[:split], after.table[split:]), dtype=np.float64)
        second = np.where(is_known, later, rates)
        worth = second + (1.0 - second) * beyond
        worth *= self._discount
        worth *= 1.0 - first
        worth += first
        worth *= self._nearness[split]
        return worth


class _Forecasts:
    """Of a step: probabilities [layers, experts], which layers are known, and where both lie."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.table = np.zeros((num_layers, num_experts), np.float32)
        self.is_known = np.zeros(num_layers, dtype=bool)
        self.addresses = self.table.ctypes.data, self.is_known.ctypes.data


class BeladyEviction(LookBack):
    """The expert whose next use is farthest leaves: the bound for one cache over all layers.

    `future` lists every use in the order in which `touch` will be told them. For replay only.
    ValueError for a use that was not foretold. O(log n) a use, amortised.
    """

    def __init__(self, shape: ModelShape, num_slots: int, *, future: Iterable[ExpertKey]) -> None:
        self._next: dict[ExpertKey, deque[int]] = {}
        for moment, key in enumerate(future):
            self._next.setdefault(key, deque()).append(moment)
        self._end = sum(map(len, self._next.values()))
        self._members: set[ExpertKey] = set()
        self._heap: list[tuple[int, ExpertKey]] = []

    def admit(self, key: ExpertKey) -> None:
        self._members.add(key)
        heapq.heappush(self._heap, (-self._next_use(key), key))

    def touch(self, key: ExpertKey) -> None:
        uses = self._next.get(key)
        if not uses:
            raise ValueError(f"a use of {key} that the future given to belady does not hold")
        uses.popleft()
        if key in self._members:
            heapq.heappush(self._heap, (-self._next_use(key), key))

    def discard(self, key: ExpertKey) -> None:
        self._members.discard(key)

    def victim(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        passed: list[tuple[int, ExpertKey]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            moment, key = entry
            # An entry whose moment has passed, or whose key has left, is not put back.
            if key in self._members and -moment == self._next_use(key) and entry not in passed[-1:]:
                passed.append(entry)
                if evictable(key):
                    found = key
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def _next_use(self, key: ExpertKey) -> int:
        uses = self._next.get(key)
        return uses[0] if uses else self._end
