"""One Mixture-of-Experts layer of a step: predict, acquire, compute, combine.

Joins cache, transfers, prefetcher, predictors and arithmetic; each of those knows its own part
only. Prediction decides what is read ahead and nothing else.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..collect.schema import ExpertKey, ModelShape
from ..kernels.expert_mlp import combine
from ..kernels.weights import ExpertWeights
from ..predictors.base import Forecast
from .acquisition import Acquisition
from .experts.arithmetic import ClosedArithmetic, ExpertArithmetic
from .experts.cache import CacheCounters, ExpertCache, Slot
from .experts.prefetcher import Prefetcher
from .experts.transfer import TransferEngine
from .host_misses import HostMisses
from .layer_choice import LayerChoice, rows_by_expert
from .observers import Observer, Observers
from .stats import ExpertTraffic


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Where experts lie: slots [layers, E] int64 of `weights`, negative for those that are absent.

    Kept up to date; not to be written to.
    """

    weights: ExpertWeights
    slots: np.ndarray


class ExpertExecutor:
    """Serves the experts of every layer of a model from one cache. One thread; blocks on reads."""

    def __init__(
        self,
        *,
        shape: ModelShape,
        cache: ExpertCache,
        transfers: TransferEngine,
        prefetcher: Prefetcher,
        arithmetic: ExpertArithmetic,
        block_bytes: int,
        host_misses: HostMisses | None = None,
    ) -> None:
        self.shape = shape
        self.cache = cache
        self.prefetcher = prefetcher
        self._transfers = transfers
        self.arithmetic = arithmetic
        self._block_bytes = block_bytes
        self._host_misses = host_misses
        self.on_routing: Callable[[int, np.ndarray], None] | None = None
        """Told each layer and the ids [T, K] it chose, in the order they are computed."""
        self._observers = Observers(shape)
        self._step = 0
        self._traffic = ExpertTraffic()
        self._stall_s = 0.0
        self._before = CacheCounters()
        self._is_decode = False
        self._is_asking = False
        self._num_streamed: int | None = None
        self._lacked = True
        self._began_s = 0.0
        self._forecast_s = 0.0

    def close(self) -> None:
        """Cancel what is read ahead, and let go of the slots; nothing is computed after."""
        self.prefetcher.close()
        self.arithmetic, self._host_misses = ClosedArithmetic(), None

    @property
    def is_degraded(self) -> bool:
        """A predictor was switched off or reads ahead fail: slower, never wrong."""
        return self._observers.has_failed or self._transfers.degraded

    def mark_degraded(self) -> None:
        """Remember that a predictor failed before it was asked for anything here."""
        self._observers.has_failed = True

    def begin_step(
        self, step: int, observers: Sequence[Observer], *, num_streamed: int | None = None
    ) -> None:
        """A forward pass begins. `step` counts passes; `observers` cover its rows in order.
        The first `num_streamed` rows are computed as single tokens are, the others as prompts are;
        None leaves it to how many rows an expert gets.

        Predictors of sequences that decode are asked for the whole pass, since their new token is
        known; the reads that this starts run while the first layers compute.
        """
        self._step = step
        self._num_streamed = num_streamed
        # With every expert in its slot there is nothing left to forecast.
        self._observers.begin(() if self._holds_all else observers)
        self._traffic = ExpertTraffic()
        self._stall_s = 0.0
        self._before = replace(self.cache.counters)
        # Durations of prompts say nothing about those of single tokens, so only pure decode steps
        # are shown to the prefetcher's controller.
        self._is_decode = 0 < len(self._observers.decoding) == len(observers)
        self.prefetcher.begin_step(is_decode=self._is_decode)
        self._is_asking = self.prefetcher.wants_forecasts
        if self._is_decode and not self._is_asking:
            self._observers.dismiss()  # what a prompt teaches, though, a predictor always sees
        self._began_s = time.perf_counter()
        self._forecast_s = 0.0
        self.cache.advance(step, -1)
        if self._is_asking and self._observers.decoding:
            for horizon in (1, 2):
                self._offer(self._observers.before_token(horizon, step=step + horizon - 1))
        # Execution stands before layer 0, whose experts may be read ahead as well.
        self.prefetcher.advance(step, -1)
        self._forecast_s += time.perf_counter() - self._began_s

    def table(self) -> SlotTable | None:
        """Where experts lie, for a pass that computes by itself the layers which lack none of them.

        It has these counted by `record`, in order, and `serve`d the others; or all, if it
        `serves_all`. None where no native code computes.
        """
        weights = self.arithmetic.native_weights
        if weights is None or self._host_misses is not None:
            return None
        return SlotTable(weights, self.slots())

    @property
    def device_weights(self) -> ExpertWeights | None:
        """The slots as a device's own decoder computes from them; None where it may not."""
        return None if self._host_misses is not None else self.arithmetic.device_weights

    @property
    def expects_no_miss(self) -> bool:
        """Whether a pass will likely find all it needs, and nobody is shown what it does.

        Misses come in runs, so the last pass tells.
        """
        return not self._observers and (self._holds_all or not self._lacked)

    @property
    def _holds_all(self) -> bool:
        return self.cache.num_ready == self.shape.num_routed_experts

    @property
    def wants_states(self) -> bool:
        """Whether somebody is shown this pass's hidden states."""
        return bool(self._observers)

    def slots(self) -> np.ndarray:
        """Slots [layers, E] int64, negative for experts that are in none yet; kept up to date."""
        return self.cache.table(self.shape.num_moe_layers, self.shape.num_experts)

    @property
    def serves_all(self) -> bool:
        """Somebody is to be asked or shown something in every layer of this pass."""
        return bool(self._observers)

    def serve(
        self,
        layer_idx: int,
        hidden_states: torch.Tensor,
        topk_ids: np.ndarray,
        topk_weights: torch.Tensor,
    ) -> Generator[None]:
        """See to the experts of one layer of a pass that computes them itself by `table`.

        At first the reads of what is missing are begun; each further time this blocks until more
        experts are in slots, where they stay until the one after. Shapes as for `forward`; all
        three may be overwritten when this is advanced. Raises TransferError.
        """
        self._tell_routing(layer_idx, topk_ids)
        self.cache.advance(self._step, layer_idx)
        chosen = topk_ids[0].tolist() if len(topk_ids) == 1 else set(topk_ids.reshape(-1).tolist())
        acquisition = self._acquisition([ExpertKey(layer_idx, one) for one in sorted(chosen)])
        try:
            with acquisition:
                self._forecast(layer_idx, hidden_states, is_free=acquisition.is_reading)
                if self._observers:
                    # What they are shown stays theirs.
                    shown = topk_ids.copy(), topk_weights.clone(), hidden_states.clone()
                    self._observe(layer_idx, *shown)
                if not acquisition.has_ready:
                    yield  # for what else the layer computes
                for _ in acquisition.waves():
                    yield
        finally:
            self._stall_s += acquisition.stall_s

    def _acquisition(self, needed: Sequence[ExpertKey]) -> Acquisition:
        return Acquisition(
            needed,
            cache=self.cache,
            transfers=self._transfers,
            prefetcher=self.prefetcher,
            traffic=self._traffic,
        )

    def record(self, topk_ids: np.ndarray, *, first_layer: int) -> None:
        """Count the look-ups of layers that lacked nothing: topk_ids [l, T, K]."""
        traffic, cache = self._traffic, self.cache
        num_uses = num_prefetched = 0
        for place, ids in enumerate(topk_ids if self.on_routing is not None else ()):
            self._tell_routing(first_layer + place, ids)
        for layer_idx, ids in enumerate(topk_ids.tolist(), start=first_layer):
            cache.advance(self._step, layer_idx)
            # A token's experts are distinct.
            chosen = ids[0] if len(ids) == 1 else {expert for row in ids for expert in row}
            for expert_idx in sorted(chosen):
                key = ExpertKey(layer_idx, expert_idx)
                num_uses += 1
                if cache.record_use(key):
                    num_prefetched += 1
                    traffic.prefetch_used_next += self.prefetcher.was_for_next(key)
        traffic.lookups += num_uses
        traffic.hits_prefetched += num_prefetched
        traffic.hits_resident += num_uses - num_prefetched

    def end_step(self) -> tuple[ExpertTraffic, float]:
        """The pass is over: its look-ups and bytes, and the seconds it waited for experts.

        Those of a device are told when they are over, so the last may count for the next pass.
        """
        self._stall_s += self._transfers.device_stall_s()
        if self._is_decode:
            self.prefetcher.end_step(
                stall_s=self._stall_s,
                on_demand_bytes=self._traffic.bytes_on_demand,
                wall_s=time.perf_counter() - self._began_s,
                forecast_s=self._forecast_s,
            )
        self._lacked = self._traffic.misses + self._traffic.late_hits > 0
        now, before, traffic = self.cache.counters, self._before, self._traffic
        traffic.prefetch_issued = now.prefetch_issued - before.prefetch_issued
        traffic.prefetch_used = now.prefetch_used - before.prefetch_used
        traffic.prefetch_wasted = now.prefetch_wasted - before.prefetch_wasted
        traffic.prefetch_cancelled = now.prefetch_cancelled - before.prefetch_cancelled
        started = traffic.prefetch_issued - traffic.prefetch_cancelled
        traffic.bytes_prefetched = max(0, started) * self._block_bytes
        return traffic, self._stall_s

    def serve_at_once(
        self, layer_idx: int, module: Any, choice: LayerChoice, *, compute: Callable[[], None]
    ) -> torch.Tensor | None:
        """Have a layer's experts brought, and computed by `compute` while they lie in `slots`.

        Where they do not fit at once they are computed here, in waves: [T, H]. Blocks on reads.
        Raises TransferError.
        """
        self._tell_routing(layer_idx, choice.ids)
        self.cache.advance(self._step, layer_idx)
        rows = rows_by_expert(choice.ids)
        computed: torch.Tensor | None = None
        acquisition = self._acquisition([ExpertKey(layer_idx, expert_idx) for expert_idx in rows])
        try:
            with acquisition:
                is_free, is_first = acquisition.is_reading, acquisition.is_blocking
                # Whoever waits on the host, for disk, has time to forecast before, else the device
                # is given its work first.
                if is_first:
                    self._forecast(layer_idx, choice.states, is_free=is_free)
                if acquisition.gather():
                    compute()
                else:
                    computed = self._in_waves(module, choice, acquisition, rows)
                if not is_first:
                    self._forecast(layer_idx, choice.states, is_free=is_free)
        finally:
            self._stall_s += acquisition.stall_s
        if self._observers:
            self._observe(layer_idx, *choice.kept())
        return computed

    def _in_waves(
        self,
        module: Any,
        choice: LayerChoice,
        acquisition: Acquisition,
        rows: dict[int, np.ndarray],
    ) -> torch.Tensor:
        num_rows, top_k = choice.ids.shape
        outputs = choice.hidden_states.new_empty(num_rows * top_k, choice.hidden_states.shape[1])
        for wave in acquisition.waves():
            self._compute(module, choice.hidden_states, wave, rows, top_k=top_k, out=outputs)
        return combine(outputs.view(num_rows, top_k, -1), choice.topk_weights, choice.topk_ids)

    def forward(
        self,
        layer_idx: int,
        module: Any,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The routed experts' output [T, H] of one layer. Raises TransferError.

        hidden_states [T, H], topk_ids and topk_weights [T, K] as the router gave them. The copy of
        `topk_ids` to the host is the one synchronisation of a layer on a device. What `module` has
        as `outrider_meanwhile` is called once the reads of what is missing are under way.
        """
        ids = topk_ids.cpu().numpy()  # [T, K]
        self._tell_routing(layer_idx, ids)
        self.cache.advance(self._step, layer_idx)
        rows = rows_by_expert(ids)
        needed = [ExpertKey(layer_idx, expert_idx) for expert_idx in rows]
        on_host = self._on_host(needed)
        acquisition = self._acquisition(
            [key for key in needed if key not in on_host] if on_host else needed
        )
        outputs = hidden_states.new_empty(ids.size, hidden_states.shape[1])  # [T * K, H]
        with acquisition:
            # The misses are being read by now, so forecasting costs no stall.
            self._forecast(layer_idx, hidden_states, is_free=acquisition.is_reading)
            meanwhile = getattr(module, "outrider_meanwhile", None)
            if meanwhile is not None:
                meanwhile()
            if self._host_misses is not None and on_host:
                self._host_misses.compute(
                    module,
                    hidden_states,
                    rows={key: rows[key.expert_idx] for key in on_host},
                    top_k=ids.shape[1],
                    out=outputs,
                )
            for wave in acquisition.waves():
                self._compute(module, hidden_states, wave, rows, top_k=ids.shape[1], out=outputs)
        self._stall_s += acquisition.stall_s
        if self._observers:
            self._observe(layer_idx, ids, topk_weights, hidden_states)
        return combine(outputs.view(*ids.shape, -1), topk_weights, topk_ids)

    def _tell_routing(self, layer_idx: int, ids: np.ndarray) -> None:
        if self.on_routing is not None:
            self.on_routing(layer_idx, ids.copy())

    def _compute(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        wave: list[tuple[ExpertKey, Slot]],
        rows: dict[int, np.ndarray],
        *,
        top_k: int,
        out: torch.Tensor,
    ) -> None:
        self.arithmetic.outputs(
            module,
            hidden_states,
            slots=[slot for _, slot in wave],
            rows=[rows[key.expert_idx] for key, _ in wave],
            top_k=top_k,
            out=out,
            num_streamed=self._num_streamed,
        )

    def _on_host(self, needed: list[ExpertKey]) -> list[ExpertKey]:
        """Which of a layer's experts are computed where they lie; counted as misses."""
        if self._host_misses is None:
            return []
        self.prefetcher.settle()
        chosen = self._host_misses.choose(needed, self.cache)
        for key in chosen:
            self.cache.record_use(key)
        self._traffic.lookups += len(chosen)
        self._traffic.misses += len(chosen)
        self._traffic.host_computed += len(chosen)
        return chosen

    def _forecast(self, layer_idx: int, hidden_states: torch.Tensor, *, is_free: bool) -> None:
        # What compute would have waited for anyway is no cost of a forecast.
        began = time.perf_counter()
        is_asking = self._is_asking and bool(self._observers)
        if is_asking and self.prefetcher.is_due(self._step, layer_idx, is_free=is_free):
            self._offer(self._observers.in_pass(layer_idx, hidden_states, step=self._step))
        self.prefetcher.advance(self._step, layer_idx)
        if not is_free:
            self._forecast_s += time.perf_counter() - began

    def _observe(
        self, layer_idx: int, ids: np.ndarray, weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        began = time.perf_counter()
        self._observers.observe(layer_idx, ids, weights, hidden_states)
        self._forecast_s += time.perf_counter() - began

    def _offer(self, forecasts: Sequence[Forecast]) -> None:
        for forecast in forecasts:
            self.prefetcher.offer(forecast)
