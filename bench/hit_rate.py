"""`outrider bench hit-rate`: every policy, predictor and budget over the same recorded routing.

Chooses the arms, runs them in a pool of processes, and makes rows. Replay itself is elsewhere.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UsageError
from ..runtime.experts.eviction import DEFAULT_EVICTION, EVICTIONS
from ..runtime.experts.prefetcher import Mode
from ..runtime.processes import process_pool
from ..runtime.sizes import parse_budget, resolve
from .arms import BELADY, ROUTING_NAME, ArmSpec, run_arm, save_foretold
from .devices import Device
from .environment import environment
from .forecaster import Source
from .foretold import load_foretold
from .hit_rows import RowMaker
from .model_shapes import Geometry, carriage, step_times
from .routing import Routing

BUDGETS = ("5%", "10%", "25%", "50%", "75%")
FORECAST = "forecast"
ORACLE = "oracle"
WARMUP_TOKENS = 2048

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class HitRateOptions:
    """What is replayed. `policies` run demand-only, `forecast` once for each predictor; each of
    `predictors` also reads ahead, with `eviction` choosing victims. `links` replaces the device's.
    Work goes to `cluster`, if there is one, through files in `scratch`.
    """

    source: Source
    device: Device
    geometry: Geometry
    format: str
    policies: tuple[str, ...]
    predictors: tuple[str, ...]
    budgets: tuple[str, ...] = BUDGETS
    links: tuple[float, ...] = ()
    prefetch: Mode = "on"
    eviction: str = DEFAULT_EVICTION
    warmup_tokens: int = WARMUP_TOKENS
    has_prompts: bool = False
    workers: int | None = None
    cluster: Executor | None = None
    scratch: Path | None = None


def bench_hit_rate(options: HitRateOptions, *, progress: Progress) -> dict[str, Any]:
    """The document of one run: deterministic but for its environment. Blocks for minutes.

    Raises UsageError for unknown names and too few tokens.
    """
    check(options)
    around = environment()
    routing = options.source.read()
    with workspace(options.workers, options.cluster, options.scratch) as (folder, pool):
        routing.save(folder / ROUTING_NAME)
        folders = foretell_all(options, folder, pool=pool, progress=progress)
        arms = choose_arms(options, routing)
        tables = run_all(arms, folder, folders, pool=pool, progress=progress)
        rows = RowMaker(routing, options, stamp=around.stamp()).rows(
            [(arm, tables[arm]) for arm in arms],
            {name: load_foretold(Path(one)) for name, one in folders.items()},
        )
    return {
        "bench": "hit-rate",
        "environment": around.ended().as_dict(),
        "settings": settings_of(options, routing),
        "rows": rows,
    }


def choose_arms(
    options: HitRateOptions, routing: Routing, *, num_layers: int | None = None
) -> list[ArmSpec]:
    """All arms, demand-only ones first; the same budgets, hence bytes, for each."""
    shape = routing.shape
    total = (num_layers or shape.num_moe_layers) * shape.num_experts
    links = options.links or (options.device.link_bytes_per_s,)
    times = step_times(options.geometry, options.device, fmt=options.format)
    brought = carriage(options.geometry, options.device, fmt=options.format)
    scale = options.geometry.top_k / shape.top_k
    first = ArmSpec(
        policy=options.eviction,
        predictor="none",
        prefetch="off",
        budget="",
        num_slots=1,
        carriage=replace(brought, expert_bytes=round(scale * brought.expert_bytes)),
        times=replace(times, expert_s=scale * times.expert_s),
        prompt_tokens=options.source.prompt_tokens,
        warm_from=warm_from(routing, options.warmup_tokens, options.source.prompt_tokens),
        num_layers=num_layers,
        has_prompts=options.has_prompts,
    )
    arms = []
    for link in links:
        for budget in options.budgets:
            base = replace(
                first,
                budget=budget,
                num_slots=num_slots(budget, total, first.carriage.expert_bytes),
                carriage=replace(first.carriage, link_bytes_per_s=link),
            )
            for policy in options.policies:
                told = options.predictors if policy == FORECAST else ("none",)
                arms += [replace(base, policy=policy, predictor=name) for name in told]
            if options.prefetch != "off":
                arms += [
                    replace(base, predictor=name, prefetch=options.prefetch)
                    for name in options.predictors
                ]
    return list(dict.fromkeys(arms))


def num_slots(budget: str, total: int, expert_bytes: int) -> int:
    """Slots that a budget buys of `total` experts. UsageError for less than one."""
    return resolve(
        parse_budget(budget),
        slot_bytes=expert_bytes,
        num_experts_total=total,
        available_bytes=total * expert_bytes,
    )


def warm_from(routing: Routing, warmup_tokens: int, prompt_tokens: int) -> int:
    """First sequence after `warmup_tokens`, or after a quarter of the tokens if that is earlier."""
    decoded = np.cumsum(np.diff(routing.offsets) - prompt_tokens)
    wanted = min(warmup_tokens, int(decoded[-1]) // 4)
    return min(1 + int(np.searchsorted(decoded, wanted)), len(decoded) - 1)


@contextmanager
def workspace(
    workers: int | None, cluster: Executor | None = None, scratch: Path | None = None
) -> Iterator[tuple[Path, Executor]]:
    """A folder that goes when the run ends, and processes that share it: those of `cluster`, if
    there is one, all of which must see the folder `scratch`.
    """
    count = workers or max(1, min(len(os.sched_getaffinity(0)), 8))
    with (
        tempfile.TemporaryDirectory(prefix="outrider-replay-", dir=scratch) as name,
        cluster or process_pool(count) as pool,
    ):
        yield Path(name), pool


def foretell_all(
    options: HitRateOptions, folder: Path, *, pool: Executor, progress: Progress
) -> dict[str, str]:
    """Folders of what each predictor says, made once."""
    folders = {
        name: str(folder / f"foretold-{index}") for index, name in enumerate(options.predictors)
    }
    jobs = {
        pool.submit(save_foretold, name, options.source, one): name for name, one in folders.items()
    }
    _collect(jobs, "forecasting", progress)
    return folders


def run_all(
    arms: Sequence[ArmSpec],
    folder: Path,
    folders: dict[str, str],
    *,
    pool: Executor,
    progress: Progress,
) -> dict[ArmSpec, np.ndarray]:
    """The table of each arm. The longest are begun first, so that none is left for the end."""
    ordered = sorted(arms, key=lambda arm: (arm.predictor == "none", arm.num_slots))
    jobs = {
        pool.submit(run_arm, arm, str(folder), folders.get(arm.predictor)): arm for arm in ordered
    }
    return _collect(jobs, "replaying", progress)


def settings_of(options: HitRateOptions, routing: Routing) -> dict[str, Any]:
    """What a run was asked for, for whoever wants to repeat it."""
    source = options.source
    return {
        "traces": [directory.name for directory in source.directories],
        "split": source.split,
        "prompt_tokens": source.prompt_tokens,
        "prompts": "through the cache" if options.has_prompts else "shown to predictors only",
        "seed": source.seed,
        "tokens": routing.num_tokens,
        "sequences": len(routing.offsets) - 1,
        "documents": len(np.unique(routing.document)),
        "device": options.device.as_dict(),
        "model_shape": options.geometry.title,
        "format": options.format,
        "eviction": options.eviction,
    }


def _collect(jobs: dict[Future, Any], what: str, progress: Progress) -> dict[Any, Any]:
    results = {}
    for done in as_completed(jobs):
        results[jobs[done]] = done.result()
        progress(what, len(results), len(jobs))
    return results


def check(options: HitRateOptions) -> None:
    """UsageError for names that are unknown, before anything is read."""
    known = (*EVICTIONS, BELADY)
    for name in (*options.policies, options.eviction):
        if name not in known:
            raise UsageError(f"policy {name!r} is unknown; known ones: {', '.join(known)}")
    if options.eviction == BELADY:
        raise UsageError("eviction belady: the bound is for demand-only rows; see --policies")
    if options.prefetch not in ("on", "off", "auto"):
        raise UsageError(f"prefetch {options.prefetch!r} is unknown; known ones: on, off, auto")
