"""Turns forecasts into prefetches: which expert, when, and when no longer.

Pure decisions: touches no tensors and no files, and leaves eviction to the cache and copying to
the transfer engine.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...collect.schema import ExpertKey, ModelShape
from ...predictors.base import Forecast
from ..errors import TransferError, UsageError
from .cache import ExpertCache, Kind
from .controller import ReachController
from .transfer import Transfer, TransferEngine

logger = logging.getLogger(__name__)

Mode = Literal["on", "off", "auto"]
MODES: tuple[Mode, ...] = ("on", "off", "auto")

MIN_PROBABILITY = 0.3
"""Below this a prefetch is more likely to cost a useful slot than to save a stall."""

MAX_FAILURES = 3
"""Failed prefetches in a row after which no more are issued: misses still load on demand."""

SMOOTHING = 0.2


@dataclass(slots=True)
class _Moment:
    """What the newest forecast says of one layer at one step, likeliest first."""

    wanted: list[ExpertKey]
    missing: list[tuple[float, ExpertKey]]


@dataclass(frozen=True, slots=True)
class _Candidate:
    probability: float
    moment: int
    key: ExpertKey

    def rank(self) -> tuple[float, int]:
        """Likeliest first by tenths, the sooner needed of equals first."""
        return -round(self.probability, 1), self.moment


class Prefetcher:
    """Issues and cancels prefetches for one cache and one engine. Engine thread only, never blocks
    but in `close`.

    `nbytes` is what one expert takes from the link. Time is counted in moments, one per MoE layer
    and step. A prefetch is issued for an expert of probability `min_probability` or more that
    holds no slot, if at the measured bandwidth at least half of it can be copied before its
    moment, behind what is queued already, and within the step's budget: the link time that misses
    left idle. Mode "auto" lets a ReachController decide how many moments to look ahead.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfers: TransferEngine,
        *,
        shape: ModelShape,
        nbytes: int,
        mode: Mode = "auto",
        min_probability: float = MIN_PROBABILITY,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"prefetch mode {mode!r} is unknown; known ones: {', '.join(MODES)}")
        self._cache = cache
        self._transfers = transfers
        self._shape = shape
        self._nbytes = nbytes
        self._min_probability = min_probability
        self._clock = clock
        # Forecasts speak of this token and the next.
        self._max_reach = 0 if mode == "off" else 2 * shape.num_moe_layers
        self._controller = (
            ReachController(self._max_reach, cache.counters) if mode == "auto" else None
        )
        self._position = -1
        self._moments: dict[int, _Moment] = {}
        self._wanted: Counter[ExpertKey] = Counter()
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._num_failures = 0
        self._layer_s = 0.0
        self._advanced_at: float | None = None
        self._issued_bytes = 0
        self._on_demand_bytes = 0.0

    @property
    def wanted(self) -> Collection[ExpertKey]:
        """Experts that current forecasts speak for: what an on-demand reserve should `keep`.

        A live view; valid until the next call of this object.
        """
        return self._wanted.keys()

    @property
    def reach(self) -> int:
        """Moments ahead for which prefetches are issued now; 0 while turned off."""
        if self._num_failures >= MAX_FAILURES:
            return 0
        return self._max_reach if self._controller is None else self._controller.reach

    def offer(self, forecast: Forecast) -> None:
        """Take the newest forecast for its layers and step; issues nothing by itself.

        Raises ValueError if the forecast is malformed or does not fit the model.
        """
        forecast.check(self._shape)
        if not self._max_reach:
            return
        first = forecast.step * self._shape.num_moe_layers + forecast.layer_from
        rows: list[list[tuple[float, int]]] = [[] for _ in forecast.probability]
        found = np.nonzero(forecast.probability >= self._min_probability)
        values = forecast.probability[found].tolist()
        for row, expert_idx, value in zip(
            found[0].tolist(), found[1].tolist(), values, strict=True
        ):
            rows[row].append((value, expert_idx))
        for row, scored in enumerate(rows):
            moment = first + row
            self._forget(moment)
            if moment <= self._position:
                continue
            scored.sort(reverse=True)
            layer_idx = forecast.layer_from + row
            keys = [(value, ExpertKey(layer_idx, expert_idx)) for value, expert_idx in scored]
            self._moments[moment] = _Moment(
                [key for _, key in keys],
                [(value, key) for value, key in keys if self._cache.state(key) is None],
            )
            self._wanted.update(key for _, key in keys)

    def advance(self, step: int, layer_idx: int) -> None:
        """Execution stands at this layer: settle what is copied, cancel what is stale, issue more.

        Call it once the layer's own experts are pinned or submitted, so that none is a victim.
        """
        position = step * self._shape.num_moe_layers + layer_idx
        now = self._clock()
        if self._advanced_at is not None and position > self._position:
            elapsed = now - self._advanced_at
            if self._layer_s:
                # Waiting for the next request is no layer's time.
                elapsed = min(elapsed, 4.0 * self._layer_s)
                self._layer_s += SMOOTHING * (elapsed - self._layer_s)
            else:
                self._layer_s = elapsed
        self._advanced_at = now
        self._position = position
        for moment in [moment for moment in self._moments if moment <= position]:
            self._forget(moment)
        self.settle()
        self._cancel_stale()
        if self.reach:
            self._issue()

    def settle(self) -> None:
        """Commit finished prefetches and free the slots of failed ones; neither blocks nor raises.

        Call it before look-ups, so that what has arrived is a hit and not a late one.
        """
        for key, transfer in list(self._in_flight.items()):
            if transfer.done():
                self._end(key, transfer)

    def claim(self, key: ExpertKey) -> Transfer | None:
        """Hand over the copy of an expert that is needed now (a late hit), ahead of all prefetches.

        None if no prefetch of it is in flight. The caller waits, then commits the slot; or, on
        TransferError, abandons it.
        """
        transfer = self._in_flight.pop(key, None)
        if transfer is not None:
            self._cache.promote(transfer.slot)
            self._transfers.promote(transfer)
        return transfer

    def end_step(self, *, stall_s: float, on_demand_bytes: int) -> None:
        """One step is over, in which compute waited `stall_s` and misses took these bytes."""
        self._on_demand_bytes += SMOOTHING * (on_demand_bytes - self._on_demand_bytes)
        self._issued_bytes = 0
        if self._controller is not None:
            self._controller.end_step(stall_s)

    def begin(self) -> None:
        """A new sequence: its steps count from 0 again, so no forecast before it holds."""
        self._moments.clear()
        self._wanted.clear()
        self._position = -1
        self._advanced_at = None
        self._cancel_stale()

    def close(self) -> None:
        """Cancel what is queued and wait for what is being copied; idempotent."""
        for key, transfer in list(self._in_flight.items()):
            transfer.cancel()
            self._end(key, transfer)

    def _end(self, key: ExpertKey, transfer: Transfer) -> None:
        del self._in_flight[key]
        try:
            transfer.wait()
        except TransferError as error:
            self._cache.abandon(transfer.slot)
            self._num_failures += 1
            if self._num_failures == MAX_FAILURES:
                logger.warning("prefetching is turned off after repeated failures: %s", error)
        else:
            self._cache.commit(transfer.slot)
            if self._num_failures < MAX_FAILURES:
                self._num_failures = 0

    def _cancel_stale(self) -> None:
        stale = [key for key in self._in_flight if key not in self._wanted]
        for key in stale:
            transfer = self._in_flight[key]
            if transfer.cancel():
                del self._in_flight[key]
                self._cache.abandon(transfer.slot)

    def _issue(self) -> None:
        bandwidth = self._transfers.bandwidth()
        queued = self._transfers.outstanding_bytes()
        budget = self._budget(bandwidth)
        for candidate in self._candidates():
            if self._issued_bytes + self._nbytes > budget:
                return
            lead_s = (candidate.moment - self._position) * self._layer_s
            if bandwidth and self._layer_s and (queued + self._nbytes / 2) / bandwidth > lead_s:
                continue
            if self._cache.state(candidate.key) is not None:
                continue
            slot = self._cache.reserve(candidate.key, Kind.PREFETCH, keep=self.wanted)
            if slot is None:
                return
            try:
                transfer = self._transfers.submit(candidate.key, slot, Kind.PREFETCH)
            except TransferError:
                self._cache.abandon(slot)
                self._num_failures = MAX_FAILURES
                return
            self._in_flight[candidate.key] = transfer
            self._issued_bytes += self._nbytes
            queued += self._nbytes

    def _candidates(self) -> list[_Candidate]:
        last = self._position + self.reach
        candidates = [
            _Candidate(probability, moment, key)
            for moment, forecast in self._moments.items()
            if moment <= last
            for probability, key in forecast.missing
        ]
        return sorted(candidates, key=_Candidate.rank)

    def _budget(self, bandwidth: float) -> float:
        """Bytes that prefetches may take of a step's link time; one expert at the least."""
        if not bandwidth or not self._layer_s:
            return float("inf")
        step_bytes = bandwidth * self._layer_s * self._shape.num_moe_layers
        return max(step_bytes - self._on_demand_bytes, float(self._nbytes))

    def _forget(self, moment: int) -> None:
        forecast = self._moments.pop(moment, None)
        if forecast is not None:
            for key in forecast.wanted:
                self._wanted[key] -= 1
                if not self._wanted[key]:
                    del self._wanted[key]
