"""Turns forecasts into prefetches: which expert, when, and when no longer.

Pure decisions: touches no tensors and no files, and leaves eviction to the cache and copying to
the transfer engine.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Literal

from ...collect.schema import ExpertKey, ModelShape
from ...predictors.base import Forecast
from ..errors import TransferError, UsageError
from .cache import ExpertCache, Kind
from .controller import GainController
from .plan import Planner
from .price import ReadPrice
from .transfer import Transfer, TransferEngine
from .wanted import Wanted

logger = logging.getLogger(__name__)

Mode = Literal["on", "off", "auto"]
MODES: tuple[Mode, ...] = ("on", "off", "auto")

MAX_FAILURES = 3
"""Failed prefetches in a row after which no more are issued: misses still load on demand."""

SMOOTHING = 0.2

FRESH_LAYERS = 3
"""Layers for which a forecast made in the pass is as good as a new one, where asking takes time
that nothing else would. By replay of nano's ensemble, asking in every layer hides a millisecond of
stall more, or less, and takes 0.3 ms a layer (bench/LOG.md, 2026-11-27)."""

UNKNOWN_READS = 1e9
"""Reads that are taken to fit into a moment while no speed is known: all of them."""


class Prefetcher:
    """Issues and cancels prefetches for one cache and one engine. Engine thread only, never blocks
    but in `close`.

    `nbytes` is what one expert takes from the link. Time is counted in moments, one per MoE layer
    and step. A prefetch is issued for an absent expert, this token's before the next one's and the
    likelier first, if
    - at the measured bandwidth at least half of it can be copied before its moment, behind what is
      queued already, and within the step's budget: the link time that misses left idle;
    - its expected gain is positive: its probability times the share of the copy that will be done
      by then, against the odds of its being in vain times what that costs, which is a part of the
      link (`ReadPrice`) and the victim's own worth, where the eviction policy knows it.
    Mode "auto" lets a GainController decide how many moments to look ahead, or none.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfers: TransferEngine,
        *,
        shape: ModelShape,
        nbytes: int,
        mode: Mode = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"prefetch mode {mode!r} is unknown; known ones: {', '.join(MODES)}")
        self._cache = cache
        self._transfers = transfers
        self._shape = shape
        self._nbytes = nbytes
        self._clock = clock
        # Forecasts speak of this token and the next.
        self._max_reach = 0 if mode == "off" else 2 * shape.num_moe_layers
        self._controller = GainController(self._max_reach) if mode == "auto" else None
        self._price = ReadPrice(cache.counters)
        self._is_decode = True
        self._step = 0
        self._wanted = Wanted(shape, self._price)
        self._planner = Planner(shape, cache.table(shape.num_moe_layers, shape.num_experts))
        # Of a step: the layer at which its newest forecast was made, and the first it leaves out.
        self._told: dict[int, tuple[int, int]] = {}
        self._for_next: set[ExpertKey] = set()
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._num_failures = 0
        self._layer_s = 0.0
        self._advanced_at: float | None = None
        self._issued_bytes = 0
        self._on_demand_bytes = 0.0
        self._num_missed = self._num_foreseen = 0

    @property
    def wanted(self) -> Collection[ExpertKey]:
        """Experts that current forecasts speak for: what an on-demand reserve should `keep`.

        A live view; valid until the next call of this object.
        """
        return self._wanted

    @property
    def reach(self) -> int:
        """Moments ahead for which prefetches are issued now; 0 while turned off."""
        return 0 if self._num_failures >= MAX_FAILURES else self._wished_reach

    @property
    def wants_forecasts(self) -> bool:
        """Forecasts change something now: what is read ahead, or what is evicted.

        Where not, a predictor need not be asked, nor shown anything.
        """
        if self._cache.wants_forecasts and (self._wished_reach or not self._max_reach):
            return True
        return self.reach > 0 or self._is_estimating

    @property
    def _is_estimating(self) -> bool:
        """Forecasts are asked for to be judged, and nothing is read ahead."""
        controller = self._controller
        if controller is None or not self._is_decode or self._num_failures >= MAX_FAILURES:
            return False
        return controller.is_asking and not controller.reach

    @property
    def _wished_reach(self) -> int:
        if self._controller is None:
            return self._max_reach
        if self._is_decode:
            return self._controller.reach
        # Prompts are not measured: what the last tokens showed holds for them as well.
        return self._max_reach if self._controller.is_promising else 0

    def begin_step(self, *, is_decode: bool) -> None:
        """A forward pass begins: single tokens only, or with prompts among them."""
        self._is_decode = is_decode

    def offer(self, forecast: Forecast) -> None:
        """Take the newest forecast for its layers and step; issues nothing by itself.

        Eviction is told as well. Unchecked: `Forecast.check` belongs before.
        """
        self._cache.foresee(forecast)
        self._told[forecast.step] = forecast.layer_from - 1, forecast.layer_to
        if not self._max_reach:
            return
        self._wanted.take(forecast)

    def is_due(self, step: int, layer_idx: int, *, is_free: bool) -> bool:
        """A forecast in the pass would serve here: the newest is FRESH_LAYERS old or says nothing
        of the next layer, or `is_free`, since reads are waited for anyway.
        """
        after = layer_idx + 1
        if after >= self._shape.num_moe_layers:
            return False
        made_at, until = self._told.get(step, (-1, 0))
        return is_free or after >= until or layer_idx - made_at >= FRESH_LAYERS

    def advance(self, step: int, layer_idx: int) -> None:
        """Execution stands at this layer: settle what is copied, cancel what is stale, issue more.

        Call it once the layer's own experts are pinned or submitted, so that none is a victim.
        """
        position = step * self._shape.num_moe_layers + layer_idx
        if self._max_reach:
            self._keep_time(position)
        self._step, self._wanted.position = step, position
        self._told.pop(step - 1, None)
        if not (self._wanted or self._in_flight):
            return
        self._wanted.forget_before(step)
        self.settle()
        self._cancel_stale()
        if self._wanted and self.reach and self._cache.prefetch_room > 0:
            self._issue()

    def warm(self, keys: Iterable[ExpertKey]) -> None:
        """Before the first pass: begin to fill free slots with these experts, the first ones first.

        Its copies come after all others, and those not begun are cancelled as soon as execution
        advances, so a pass that comes early waits for no more than a piece of each. Counted neither
        as prefetches nor towards their limit.
        """
        for key in keys:
            if not self._cache.num_free:
                return
            if self._cache.state(key) is not None:
                continue
            slot = self._cache.reserve(key, Kind.ON_DEMAND)
            assert slot is not None, "a slot was free"
            try:
                self._in_flight[key] = self._transfers.submit(key, slot, Kind.PREFETCH)
            except TransferError:
                self._cache.abandon(slot)
                return

    def settle(self) -> None:
        """Commit finished prefetches and free the slots of failed ones; neither blocks nor raises.

        Call it before look-ups, so that what has arrived is a hit and not a late one.
        """
        for key, transfer in list(self._in_flight.items()) if self._in_flight else ():
            if transfer.done():
                self._end(key, transfer)

    def claim(self, key: ExpertKey) -> Transfer | None:
        """Hand over the copy of an expert that is needed now (a late hit), ahead of all prefetches.

        None if no prefetch of it is in flight. The caller waits, then commits the slot; or, on
        TransferError, abandons it.
        """
        transfer = self._in_flight.pop(key, None) if self._in_flight else None
        if transfer is not None:
            self._cache.promote(transfer.slot)
            self._transfers.promote(transfer)
        return transfer

    def missed(self, key: ExpertKey) -> None:
        """A look-up found neither slot nor copy of `key`: what forecasts said of it is counted."""
        if self._is_estimating:
            self._num_missed += 1
            self._num_foreseen += key in self._wanted

    def was_for_next(self, key: ExpertKey) -> bool:
        """Whether the prefetch of `key` was issued in the token before, by a forecast of horizon 2.

        True once: at the expert's first use.
        """
        if key not in self._for_next:
            return False
        self._for_next.discard(key)
        return True

    def end_step(
        self,
        *,
        stall_s: float,
        on_demand_bytes: int,
        wall_s: float | None = None,
        forecast_s: float = 0.0,
    ) -> None:
        """A decode step is over, in which compute waited `stall_s` and misses took these bytes.

        `wall_s` is what all of it took, `forecast_s` for forecasts included; None where nothing but
        stalls differs. Not for prefills: their stalls are not comparable with those of single
        tokens.
        """
        self._on_demand_bytes += SMOOTHING * (on_demand_bytes - self._on_demand_bytes)
        self._issued_bytes = 0
        if self.reach:
            # Of steps that read nothing ahead the price would learn that nothing is in vain.
            self._price.end_step(on_demand_bytes / self._nbytes)
        if self._controller is not None:
            wall_s = stall_s if wall_s is None else wall_s
            self._controller.end_step(
                wall_s=wall_s,
                stall_s=stall_s,
                forecast_s=forecast_s,
                num_absent=self._num_missed,
                num_foreseen=self._num_foreseen,
            )
            self._num_missed = self._num_foreseen = 0

    def begin(self) -> None:
        """A new sequence: its steps count from 0 again, so no forecast before it holds."""
        self._wanted.clear()
        self._told.clear()
        self._step = 0
        self._advanced_at = None
        self._cache.advance(0, -1)
        self._cancel_stale()

    def close(self) -> None:
        """Cancel what is queued and wait for what is being copied; idempotent."""
        for key, transfer in list(self._in_flight.items()):
            transfer.cancel()
            self._end(key, transfer)

    def _keep_time(self, position: int) -> None:
        now = self._clock()
        if self._advanced_at is not None and position > self._wanted.position:
            # Layers in between may have been computed without a word.
            elapsed = (now - self._advanced_at) / (position - self._wanted.position)
            if self._layer_s:
                # Waiting for the next request is no layer's time.
                elapsed = min(elapsed, 4.0 * self._layer_s)
                self._layer_s += SMOOTHING * (elapsed - self._layer_s)
            else:
                self._layer_s = elapsed
        self._advanced_at = now

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
        if not self._in_flight:
            return
        stale = [key for key in self._in_flight if key not in self._wanted]
        for key in stale:
            transfer = self._in_flight[key]
            if transfer.cancel():
                del self._in_flight[key]
                self._cache.abandon(transfer.slot)

    def _issue(self) -> None:
        bandwidth = self._transfers.bandwidth() if self._layer_s else 0.0
        budget = self._budget(bandwidth)
        if self._issued_bytes + self._nbytes > budget:
            return
        position = self._wanted.position
        due = self._planner.due(
            self._wanted.tables,
            position=position,
            last=position + self.reach,
            reads_a_moment=self._layer_s * bandwidth / self._nbytes if bandwidth else UNKNOWN_READS,
            queued=self._transfers.outstanding_bytes() / self._nbytes,
            price=self._price.price,
        )
        num_issued = 0
        for key, step, lead, chance in due:
            if self._issued_bytes + self._nbytes > budget:
                return
            if self._cache.state(key) is not None:
                continue  # issued just now, for an earlier step
            done = min(lead - num_issued, 1.0)
            if done < 0.5 or not self._pays(key, chance, done):
                continue
            if not self._start(key):
                return
            num_issued += 1
            (self._for_next.add if step > self._step else self._for_next.discard)(key)

    def _pays(self, key: ExpertKey, probability: float, done: float) -> bool:
        cost = self._price.price + self._cache.victim_worth(key)
        return probability * done > (1.0 - probability) * cost

    def _start(self, key: ExpertKey) -> bool:
        """Reserve and submit; False if there is no slot or no engine to do it."""
        slot = self._cache.reserve(key, Kind.PREFETCH, keep=self._wanted)
        if slot is None:
            return False
        try:
            self._in_flight[key] = self._transfers.submit(key, slot, Kind.PREFETCH)
        except TransferError:
            self._cache.abandon(slot)
            self._num_failures = MAX_FAILURES
            return False
        self._issued_bytes += self._nbytes
        return True

    def _budget(self, bandwidth: float) -> float:
        """Bytes that prefetches may take of a step's link time; one expert at the least."""
        if not bandwidth or not self._layer_s:
            return float("inf")
        step_bytes = bandwidth * self._layer_s * self._shape.num_moe_layers
        return max(step_bytes - self._on_demand_bytes, float(self._nbytes))
