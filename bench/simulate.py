"""`outrider bench simulate`: the replay of hit-rate with another model's sizes on a device profile.

Recorded routing is laid over the target's layers by `tiling.RULE` where its shape is another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arms import BELADY, ArmSpec, prepared
from .environment import environment
from .fit import CONTEXT_TOKENS, Fit
from .foretold import load_foretold
from .hit_rate import (
    ORACLE,
    HitRateOptions,
    Progress,
    check,
    choose_arms,
    foretell_all,
    run_all,
    settings_of,
    workspace,
)
from .hit_rows import RowMaker
from .routing import Routing
from .tiling import RULE
from .timeline import timeline

LRU = ("lru", "layer-lru")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What is replayed, as for hit-rate; a budget "auto" is what the device has room for."""

    replay: HitRateOptions
    context_tokens: int = CONTEXT_TOKENS

    @property
    def fit(self) -> Fit:
        """The model on the device."""
        one = self.replay
        return Fit(one.device, one.geometry, one.format, self.context_tokens)


def bench_simulate(options: SimulateOptions, *, progress: Progress) -> dict[str, Any]:
    """The document of one run, every row of it simulated. Blocks for minutes.

    Raises InsufficientMemoryError where the device has no room for one expert, UsageError as
    hit-rate does.
    """
    fit = options.fit
    asked = options.replay
    # Budgets are shares of all experts, whatever number of them the recorded model has.
    wanted = replace(
        asked,
        budgets=tuple(dict.fromkeys(_share(budget, fit) for budget in asked.budgets)),
        policies=tuple(dict.fromkeys((*asked.policies, *LRU))),
    )
    check(wanted)
    around = environment()
    routing = asked.source.read()
    num_layers = _tiled(routing, options)
    with workspace(asked.workers, asked.cluster, asked.scratch) as (folder, pool):
        routing.save(folder / "routing.npz")
        folders = foretell_all(wanted, folder, pool=pool, progress=progress)
        arms = choose_arms(wanted, routing, num_layers=num_layers)
        tables = run_all(arms, folder, folders, pool=pool, progress=progress)
        rows = RowMaker(routing, wanted, stamp=around.stamp()).rows(
            [(arm, tables[arm]) for arm in arms],
            {name: load_foretold(Path(one)) for name, one in folders.items()},
        )
        lines = timelines(arms, folder, folders)
    return {
        "bench": "simulate",
        "simulated": True,
        "environment": around.ended().as_dict(),
        "settings": settings_of(wanted, routing)
        | {
            "mapping": None if num_layers is None else RULE,
            "recorded_shape": shape_text(routing),
            "context_tokens": options.context_tokens,
        },
        "fit": fit.as_dict(),
        "rows": with_roofline(rows, fit, shown=asked.policies),
        "timelines": lines,
    }


def timelines(
    arms: Sequence[ArmSpec], folder: Path, folders: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One token of the first budget, read on demand and read ahead; see `timeline`."""
    first = arms[0]
    chosen = [
        next((one for one in arms if wanted(one) and one.budget == first.budget), None)
        for wanted in (
            lambda one: one.is_demand_only and one.predictor == "none" and one.policy != BELADY,
            lambda one: not one.is_demand_only and one.predictor not in ("random", ORACLE),
        )
    ]
    return [
        timeline(*prepared(one, str(folder), folders.get(one.predictor)), name=_title(one))
        for one in chosen
        if one is not None
    ]


def _title(arm: ArmSpec) -> str:
    predictor = Path(arm.predictor).name
    told = "on demand" if predictor == "none" else f"ahead by {predictor}"
    return f"{arm.policy}, {told}, {arm.budget}"


def with_roofline(
    rows: Sequence[dict[str, Any]], fit: Fit, *, shown: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows with their bound, which is the same for all of one budget, link and cache state.

    1 / max(weights read, misses of the better LRU over the link), as `bench decode` has it. Rows of
    an LRU that was run for the bound alone are left out.
    """
    missed: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["policy"] in LRU and row["prefetch"] == "off":
            place = _place(row)
            missed[place] = min(missed.get(place, np.inf), row["bytes_per_token"])
    found = []
    for row in rows:
        if row["policy"] not in shown and row["prefetch"] == "off":
            continue
        link_s = missed[_place(row)] / row["link_bytes_per_s"]
        bound = 1.0 / max(fit.read_s, link_s)
        found.append(
            row
            | {
                "roofline_tokens_per_second": bound,
                "roofline_share": row["tokens_per_second"] / bound,
                "lru_missed_bytes_per_token": missed[_place(row)],
            }
        )
    return found


def shape_text(routing: Routing) -> str:
    """A routing's shape in words."""
    shape = routing.shape
    return f"{shape.num_moe_layers} layers of {shape.num_experts} experts, top-{shape.top_k}"


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["budget"], row["link_bytes_per_s"], row["cache"]


def _tiled(routing: Routing, options: SimulateOptions) -> int | None:
    """Layers to lay the routing over; None where the recorded shape is the target's."""
    target, shape = options.replay.geometry, routing.shape
    same = (target.moe_layers, target.num_experts, target.top_k) == (
        shape.num_moe_layers,
        shape.num_experts,
        shape.top_k,
    )
    return None if same else target.moe_layers


def _share(budget: str, fit: Fit) -> str:
    if budget == AUTO:
        fit.require()
        return f"{100 * fit.share:.2f}%"
    if budget.endswith("%") or budget == "all":
        return budget
    from ..runtime.sizes import parse_budget, resolve

    slots = resolve(
        parse_budget(budget),
        slot_bytes=round(fit.geometry.expert_bytes(fit.format)),
        num_experts_total=fit.num_experts,
        available_bytes=round(max(fit.experts_bytes, 0)) + fit.num_experts,
    )
    return f"{100 * slots / fit.num_experts:.2f}%"
