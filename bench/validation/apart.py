"""What the simulator is told of this machine that no run's total shows: measured beside the runs.

How long reads of experts take, how long a call of the experts' kernel takes, and what a layer costs
at which something is asked or waited for. On the engine's own transfers, files, slots and kernels;
knows no configuration.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...collect.schema import ExpertKey
from ...runtime.engine import Engine
from ...runtime.experts.cache import Kind, Slot
from ...runtime.experts.memory import map_memory
from ...runtime.experts.thread_transfer import ThreadTransfer
from ...runtime.models import adapter

READ_BYTES = 512 << 20
MIN_ROUNDS = 5

SWEEP_BYTES = 4 << 20
"""Read between two calls: what else a token computes leaves nothing in a core's own caches."""

NUM_CALLS = 60

SLEEPS_S = (1e-4, 1e-3, 3e-3)
"""From a fast disk's read to a slow disk's queue."""


@dataclass(frozen=True, slots=True)
class ReadTimes:
    """Seconds from the submission of n reads to the last arrival: `latency_s` + n `send_s`."""

    latency_s: float
    send_s: float


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Seconds of a call of the experts' kernel: `wave_s` + `expert_s` for each expert in it."""

    wave_s: float
    expert_s: float


@dataclass(frozen=True, slots=True)
class Interruption:
    """Busy seconds that it costs to leave the native pass over a token at a layer, which is done
    for whoever asks or lacks something there: `leave_s`. To wait there costs `wake_s` and
    `wake_share` of the wait more, after it has ended.
    """

    leave_s: float
    wake_s: float
    wake_share: float


def read_times(engine: Engine, *, seed: int = 0) -> ReadTimes:
    """One to top-k experts of chance, read as a layer's misses are, by threads as the engine's.
    Blocks.

    A line through the medians.
    """
    source = engine.tier.source
    shape, chooser = source.shape, np.random.default_rng(seed)
    sizes = range(1, shape.top_k + 1)
    rounds = max(MIN_ROUNDS, min(NUM_CALLS, READ_BYTES // (sum(sizes) * source.nbytes)))
    taken_s: dict[int, list[float]] = {size: [] for size in sizes}
    sweep = np.ones(SWEEP_BYTES // 8)
    with ThreadTransfer(source, _Blocks(source.nbytes)) as transfers:
        for _ in range(rounds):
            for size in sizes:
                layer_idx = int(chooser.integers(shape.num_moe_layers))
                experts = chooser.choice(shape.num_experts, size, replace=False).tolist()
                sweep.sum()
                copies = [
                    transfers.submit(ExpertKey(layer_idx, expert_idx), slot, Kind.ON_DEMAND)
                    for slot, expert_idx in enumerate(experts)
                ]
                began = time.perf_counter()
                for copy in copies:
                    copy.wait()
                taken_s[size].append(time.perf_counter() - began)
    return ReadTimes(*_line(list(sizes), [float(np.median(taken_s[size])) for size in sizes]))


class _Blocks:
    """Slots for reads that nobody computes with."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._blocks: dict[int, memoryview] = {}

    def block(self, slot: Slot) -> memoryview:
        """Made at the first use."""
        if slot not in self._blocks:
            self._blocks[slot] = memoryview(map_memory(self._nbytes))
        return self._blocks[slot]


def _line(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Where a line through these begins, and what it rises; neither below 0."""
    if len(places) == 1:
        return 0.0, values[0] / places[0]
    rise, begin = np.polyfit(places, values, 1)
    if begin < 0.0:
        return 0.0, float(np.mean(values) / np.mean(places))
    return (float(begin), float(rise)) if rise > 0.0 else (float(np.mean(values)), 0.0)


@torch.inference_mode()
def call_times(engine: Engine, *, seed: int = 0) -> CallTimes:
    """A token's experts in calls of one to top-k, on slots of chance with cold caches. Blocks.

    A line through the medians.
    """
    loaded, tier = engine.loaded, engine.tier
    top_k, arithmetic = tier.source.shape.top_k, tier.executor.arithmetic
    module = loaded.layers[0].experts
    hidden_size = loaded.model.config.hidden_size
    states = torch.randn(1, hidden_size).to(loaded.dtype)
    out = torch.empty(top_k, hidden_size, dtype=loaded.dtype)
    chooser, sweep = np.random.default_rng(seed), np.ones(SWEEP_BYTES // 8)
    sizes = list(range(1, min(top_k, tier.num_slots) + 1))
    taken_s: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(NUM_CALLS):
        for size in sizes:
            slots = chooser.choice(tier.num_slots, size, replace=False).tolist()
            rows = [np.array([place]) for place in range(size)]
            sweep.sum()
            began = time.perf_counter()
            arithmetic.outputs(module, states, slots=slots, rows=rows, top_k=top_k, out=out)
            taken_s[size].append(time.perf_counter() - began)
    return CallTimes(*_line(sizes, [float(np.median(taken_s[size])) for size in sizes]))


def interruption(engine: Engine, busy_s: Callable[[], float]) -> Interruption:
    """What standing before each layer costs a token, and sleeping there, beside the sleep itself.
    Blocks.

    `busy_s` runs tokens and returns the seconds of one; the engine holds all its experts, so that
    nothing else waits. A line through the costs of SLEEPS_S.
    """
    num_layers = engine.tier.source.shape.num_moe_layers
    leaving, lengths, costs = [], [], []
    for sleep_s in SLEEPS_S:
        plain_s = busy_s()
        with _sleeping(engine, None):
            standing_s = busy_s()
        with _sleeping(engine, sleep_s) as slept:
            with_s = busy_s()
        length = float(np.mean(slept))
        leaving.append((standing_s - plain_s) / num_layers)
        lengths.append(length)
        costs.append((with_s - standing_s) / num_layers - length)
    return Interruption(max(0.0, float(np.median(leaving))), *_line(lengths, costs))


@contextmanager
def _sleeping(engine: Engine, seconds: float | None) -> Iterator[list[float]]:
    """Sleep before each layer, or only stand there; how long that was."""
    loaded, forward = engine.loaded, engine.tier.executor.forward
    slept: list[float] = []

    def late(*arguments: Any) -> torch.Tensor:
        if seconds is not None:
            began = time.perf_counter()
            time.sleep(seconds)
            slept.append(time.perf_counter() - began)
        return forward(*arguments)

    adapter.install(loaded.model, loaded.layers, late)
    try:
        yield slept
    finally:
        adapter.install(loaded.model, loaded.layers, forward)
