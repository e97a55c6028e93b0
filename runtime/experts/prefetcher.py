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
    """What the newest forecast says of one layer at one step."""

    wanted: list[ExpertKey]
    # Likeliest first by tenths, the sooner needed of equals first: (-tenths, moment, key).
    missing: list[tuple[float, int, ExpertKey]]


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
        for row in range(forecast.layer_to - forecast.layer_from):
            self._forget(first + row)
        rows, experts = np.nonzero(forecast.probability >= self._min_probability)
        tenths = forecast.probability[rows, experts].round(1).tolist()
        for row, expert_idx, value in zip(rows.tolist(), experts.tolist(), tenths, strict=True):
            if first + row > self._position:
                key = ExpertKey(forecast.layer_from + row, expert_idx)
                moment = self._moments.get(first + row)
                if moment is None:
                    moment = self._moments[first + row] = _Moment([], [])
                moment.wanted.append(key)
                self._wanted[key] += 1
                if self._cache.state(key) is None:
                    moment.missing.append((-value, first + row, key))

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
        if self.reach and self._cache.prefetch_room > 0:
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
        """A decode step is over, in which compute waited `stall_s` and misses took these bytes.

        Not for prefills: their stalls would be compared with those of single tokens.
        """
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
        last = self._position + self.reach
        candidates = sorted(
            candidate
            for moment, forecast in self._moments.items()
            if moment <= last
            for candidate in forecast.missing
        )
        for _, moment, key in candidates:
            if self._issued_bytes + self._nbytes > budget:
                return
            lead_s = (moment - self._position) * self._layer_s
            if bandwidth and self._layer_s and (queued + self._nbytes / 2) / bandwidth > lead_s:
                continue
            if self._cache.state(key) is not None:
                continue
            slot = self._cache.reserve(key, Kind.PREFETCH, keep=self.wanted)
            if slot is None:
                return
            try:
                transfer = self._transfers.submit(key, slot, Kind.PREFETCH)
            except TransferError:
                self._cache.abandon(slot)
                self._num_failures = MAX_FAILURES
                return
            self._in_flight[key] = transfer
            self._issued_bytes += self._nbytes
            queued += self._nbytes

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
