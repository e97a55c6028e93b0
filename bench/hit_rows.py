"""From an arm's table of counts to its rows: rates, bytes, times, and intervals by document.

Knows what a replay counts and what INTERFACES calls it; runs nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..predictors import metrics
from .arms import ArmSpec
from .foretold import Foretold
from .prediction.misses import lru_missed
from .replay import COUNTS
from .routing import STABLE_TOKENS, Routing

if TYPE_CHECKING:
    from .hit_rate import HitRateOptions

_AT = {name: index for index, name in enumerate(COUNTS)}
REPLICATES = 500


class RowMaker:
    """Rows of one run: the routing, options and surroundings are the same in each."""

    def __init__(
        self, routing: Routing, options: "HitRateOptions", *, stamp: Mapping[str, Any]
    ) -> None:
        self._routing = routing
        self._options = options
        self._stamp = stamp

    def rows(
        self,
        tables: Sequence[tuple[ArmSpec, np.ndarray]],
        foretold: Mapping[str, Foretold],
    ) -> list[dict[str, Any]]:
        """Two rows an arm, warm and cold."""
        recalls = self._recalls(tables, foretold)
        rows = []
        for state in ("warm", "cold"):
            for arm, table in tables:
                sequences = (
                    slice(arm.warm_from, None) if state == "warm" else slice(0, arm.warm_from)
                )
                row = self._row(arm, table[sequences], self._routing.document[sequences])
                row |= {"cache": state, **recalls.get((arm.predictor, arm.num_slots), {})}
                rows.append(row)
        return rows

    def _row(self, arm: ArmSpec, table: np.ndarray, document: np.ndarray) -> dict[str, Any]:
        names, index = np.unique(document, return_inverse=True)
        sums = metrics.by_document(table, index, len(names))
        expert_bytes = arm.carriage.expert_bytes
        total = dict(zip(COUNTS, sums.sum(axis=0), strict=True))
        ended = total["prefetch_issued"] - total["prefetch_cancelled"]
        geometry, shape = self._options.geometry, self._routing.shape
        return {
            "policy": arm.policy,
            "predictor": arm.predictor,
            "prefetch": arm.prefetch,
            "budget": arm.budget,
            **{name: float(rate(sums.sum(axis=0))) for name, rate in _rates(expert_bytes).items()},
            "precision": total["prefetch_used"] / ended if ended > 0 else None,
            "ci": _intervals(sums, expert_bytes, seed=self._options.source.seed),
            "simulated": True,
            "slots": arm.num_slots,
            "experts": (arm.num_layers or shape.num_moe_layers) * shape.num_experts,
            "budget_bytes": arm.num_slots * expert_bytes,
            "expert_bytes": expert_bytes,
            "link_bytes_per_s": arm.carriage.link_bytes_per_s,
            "format": self._options.format,
            "device": self._options.device.title,
            "model_shape": geometry.title,
            "tokens": int(total["tokens"]),
            "documents": len(names),
            "is_stable": bool(total["tokens"] >= STABLE_TOKENS),
            "seed": self._options.source.seed,
            "repetitions": 1,
            "model": self._routing.shape.fingerprint,
            "fingerprint": self._routing.shape.fingerprint,
            **self._stamp,
        }

    def _recalls(
        self,
        tables: Sequence[tuple[ArmSpec, np.ndarray]],
        foretold: Mapping[str, Foretold],
    ) -> dict[tuple[str, int], dict[str, float | None]]:
        """By predictor and slots: recall@k of the best forecast there is before a layer's router
        runs, over all look-ups and over those that a global LRU of that size misses.
        """
        routing, shape = self._routing, self._routing.shape
        rows = _decoded_rows(routing, self._options.source.prompt_tokens)
        ids = routing.topk_ids[rows]
        sizes = dict.fromkeys(arm.num_slots for arm, _ in tables if arm.num_layers is None)
        is_missed = {slots: lru_missed(ids, shape.num_experts, num_slots=slots) for slots in sizes}
        recalls: dict[tuple[str, int], dict[str, float | None]] = {}
        for name, told in foretold.items():
            best = told.best(shape.num_moe_layers)
            if best is None:
                continue
            found = _found(best[rows], ids)
            for slots, missed in is_missed.items():
                foretold_misses, misses = metrics.recall_on_misses(found, missed)
                recalls[name, slots] = {
                    "recall_at_k": float(found.mean()),
                    "recall_on_misses": _share(foretold_misses.sum(), misses.sum()),
                }
        return recalls


def _found(best: np.ndarray, ids: np.ndarray) -> np.ndarray:
    found = np.empty(ids.shape, dtype=bool)
    for first in range(0, len(ids), 1024):
        part = slice(first, first + 1024)
        ranking = metrics.ranked(best[part].astype(np.float32), ids.shape[-1])
        found[part] = metrics.found(ranking, ids[part])
    return found


def _decoded_rows(routing: Routing, prompt_tokens: int) -> np.ndarray:
    place = np.arange(routing.num_tokens)
    starts = np.repeat(routing.offsets[:-1], np.diff(routing.offsets))
    return np.flatnonzero(place - starts >= prompt_tokens)


def _rates(expert_bytes: int) -> dict[str, Any]:
    """Each figure of a row as a function of sums [..., len(COUNTS)]."""

    def of(name: str) -> Any:
        return lambda sums: sums[..., _AT[name]]

    def per(amount: Any, unit: str) -> Any:
        return lambda sums: metrics.ratio(amount(sums), sums[..., _AT[unit]])

    def moved(sums: np.ndarray) -> np.ndarray:
        return sums[..., _AT["bytes_on_demand"]] + sums[..., _AT["bytes_prefetched"]]

    def hits(sums: np.ndarray) -> np.ndarray:
        return sums[..., _AT["hits_resident"]] + sums[..., _AT["hits_prefetched"]]

    return {
        "hit_rate": per(hits, "lookups"),
        "late_rate": per(of("late_hits"), "lookups"),
        "miss_rate": per(of("misses"), "lookups"),
        "bytes_per_token": per(moved, "tokens"),
        "on_demand_bytes_per_token": per(of("bytes_on_demand"), "tokens"),
        "prefetched_bytes_per_token": per(of("bytes_prefetched"), "tokens"),
        "wasted_bytes_per_token": per(
            lambda sums: expert_bytes * sums[..., _AT["prefetch_wasted"]], "tokens"
        ),
        "stall_s_per_token": per(of("stall_s"), "tokens"),
        "tokens_per_second": per(of("tokens"), "seconds"),
    }


_WITH_INTERVALS = ("hit_rate", "bytes_per_token", "stall_s_per_token", "tokens_per_second")


def _intervals(
    sums: np.ndarray, expert_bytes: int, *, seed: int
) -> dict[str, tuple[float, float] | None]:
    bootstrap = metrics.Bootstrap(len(sums), replicates=REPLICATES, seed=seed)
    rates = _rates(expert_bytes)
    return {name: bootstrap.interval(rates[name], sums) for name in _WITH_INTERVALS}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
