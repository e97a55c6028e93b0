"""One arm of a replay by its names, run in a process of its own over files that all arms share.

Knows how a policy, a predictor and a budget become a Replay; not which arms are wanted, nor rows.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ExpertKey, ModelShape
from ..runtime.experts.eviction import EVICTIONS, EvictionPolicy
from ..runtime.experts.prefetcher import Mode
from .foretold import Foretold, load_foretold
from .replay import Arm, Carriage, Replay, Schedule, StepTimes
from .routing import load_routing
from .tiling import tile_foretold, tile_routing

if TYPE_CHECKING:
    from .forecaster import Source

BELADY = "belady"
ROUTING_NAME = "routing.npz"


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """Names of one arm. `predictor` "none" makes no forecasts; `prefetch` "off" reads none ahead.

    `num_layers` tiles the recorded layers to so many (None: as recorded); `warm_from` is the first
    sequence that is counted as warm.
    """

    policy: str
    predictor: str
    prefetch: Mode
    budget: str
    num_slots: int
    carriage: Carriage
    times: StepTimes
    prompt_tokens: int
    warm_from: int
    num_layers: int | None = None
    has_prompts: bool = False

    @property
    def is_demand_only(self) -> bool:
        """Nothing is read ahead, whatever is forecast."""
        return self.prefetch == "off"


def run_arm(spec: ArmSpec, workspace: str, folder: str | None) -> np.ndarray:
    """A table [S, len(replay.COUNTS)] of one arm. `folder` holds what its predictor said.

    Belady is the bound of each part by itself: it replays the cold sequences from nothing, and the
    warm ones from the experts that they use soonest, as whoever knows the future would.
    """
    # A replay makes no cycles, and looking for some takes a tenth of its time.
    gc.disable()
    schedule = _schedule(workspace, spec.prompt_tokens, spec.num_layers, spec.has_prompts)
    foretold = None if folder is None else _foretold(folder, spec.num_layers, schedule.shape)
    shape, count = schedule.shape, schedule.num_sequences
    if spec.policy != BELADY:
        eviction = partial(EVICTIONS[spec.policy], shape, spec.num_slots)
        return Replay(schedule, _arm(spec, eviction, foretold)).run(range(count))
    parts = []
    for sequences in (range(spec.warm_from), range(spec.warm_from, count)):
        future = schedule.uses(sequences)
        replay = Replay(schedule, _arm(spec, _belady(shape, spec.num_slots, future), foretold))
        if sequences.start:
            replay.preload(list(dict.fromkeys(future)))
        if len(sequences):
            parts.append(replay.run(sequences))
    return np.concatenate(parts)


def prepared(spec: ArmSpec, workspace: str, folder: str | None) -> tuple[Schedule, Arm]:
    """What `run_arm` would replay, for whoever wants to watch; not for Belady."""
    schedule = _schedule(workspace, spec.prompt_tokens, spec.num_layers, spec.has_prompts)
    foretold = None if folder is None else _foretold(folder, spec.num_layers, schedule.shape)
    eviction = partial(EVICTIONS[spec.policy], schedule.shape, spec.num_slots)
    return schedule, _arm(spec, eviction, foretold)


def save_foretold(name: str, source: "Source", folder: str) -> None:
    """Let a predictor follow the sequences and keep what it says in `folder`."""
    # Brings torch, which arms do without.
    from .forecaster import foretell

    foretell(name, source).save(Path(folder))


def _belady(
    shape: ModelShape, num_slots: int, future: Sequence[ExpertKey]
) -> Callable[[], EvictionPolicy]:
    from ..runtime.experts.foresight import BeladyEviction

    return lambda: BeladyEviction(shape, num_slots, future=future)


def _arm(spec: ArmSpec, eviction: Callable[[], EvictionPolicy], foretold: Foretold | None) -> Arm:
    return Arm(
        num_slots=spec.num_slots,
        eviction=eviction,
        foretold=foretold,
        prefetch=spec.prefetch,
        carriage=spec.carriage,
        times=spec.times,
    )


@lru_cache(maxsize=2)
def _schedule(
    workspace: str, prompt_tokens: int, num_layers: int | None, has_prompts: bool
) -> Schedule:
    routing = load_routing(Path(workspace) / ROUTING_NAME)
    if num_layers is not None:
        routing = tile_routing(routing, num_layers)
    return Schedule(routing, prompt_tokens=prompt_tokens, has_prompts=has_prompts)


@lru_cache(maxsize=8)
def _foretold(folder: str, num_layers: int | None, shape: ModelShape) -> Foretold:
    foretold = load_foretold(Path(folder))
    return foretold if num_layers is None else tile_foretold(foretold, num_layers)
