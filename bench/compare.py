"""`outrider bench compare A B`: which figures of B are worse than A's beyond noise.

Measured figures have intervals: a change counts where the intervals do not meet. Replayed figures
are the same in every run: any change beyond rounding counts. Both must exceed `least`, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import InvalidDataError

LEAST_CHANGE = 0.01
"""Smaller relative changes are not worth a word, however certain."""


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    is_more_better: bool
    has_spread: bool


@dataclass(frozen=True, slots=True)
class _Rules:
    """What rows of a kind are matched by, what is compared, and what must be equal to compare."""

    identity: tuple[str, ...]
    figures: tuple[_Figure, ...]
    same: tuple[str, ...] = ()
    same_settings: tuple[str, ...] = ()


_REPLAY_FIGURES = (
    _Figure("hit_rate", True, False),
    _Figure("bytes_per_token", False, False),
    _Figure("stall_s_per_token", False, False),
    _Figure("tokens_per_second", True, False),
)
_REPLAY_IDENTITY = ("policy", "predictor", "prefetch", "budget", "link_bytes_per_s", "cache")
_REPLAY_SETTINGS = ("split", "prompt_tokens", "prompts", "tokens", "documents", "seed")

RULES = {
    "hit-rate": _Rules(
        _REPLAY_IDENTITY,
        _REPLAY_FIGURES,
        ("fingerprint", "device", "model_shape", "format"),
        _REPLAY_SETTINGS,
    ),
    "simulate": _Rules(
        _REPLAY_IDENTITY,
        _REPLAY_FIGURES,
        ("fingerprint", "device", "model_shape", "format"),
        _REPLAY_SETTINGS,
    ),
    "decode": _Rules(
        ("arm", "budget", "format", "cache"),
        (_Figure("tokens_per_second", True, True),),
        ("fingerprint", "device"),
    ),
    "transfer": _Rules(("medium", "block_bytes", "depth"), (_Figure("gb_per_s", True, True),)),
    "kernels": _Rules(
        ("op", "impl", "format", "shape", "phase", "tokens", "activations"),
        (_Figure("share_of_read", True, True),),
    ),
    "serve": _Rules(("max_concurrency",), (_Figure("output_throughput", True, True),)),
    "evaluate": _Rules(
        ("predictor", "moment", "distance"),
        (_Figure("recall_at_k", True, False),),
        ("fingerprint",),
    ),
}


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    kinds: tuple[str, str],
    least: float = LEAST_CHANGE,
) -> dict[str, Any]:
    """What changed from one document to another of the same kind and subject.

    Each change: the row's identity, the figure, both values, `ratio` (above 1 is better) and
    `verdict` regression, improvement or unchanged. InvalidDataError where they do not compare.
    """
    kind = kinds[0]
    if kinds[0] != kinds[1]:
        raise InvalidDataError(f"a {kinds[0]} result and a {kinds[1]} result do not compare")
    if kind not in RULES:
        raise InvalidDataError(f"{kind} results are not compared; these are: {', '.join(RULES)}")
    rules = RULES[kind]
    _refuse_others(before, after, rules)
    old, new = _by_identity(before, rules), _by_identity(after, rules)
    shared = [identity for identity in old if identity in new]
    if not shared:
        raise InvalidDataError("the two results have no row in common")
    changes = [
        change
        for identity in shared
        for figure in rules.figures
        if (change := _change(identity, old[identity], new[identity], figure, rules, least))
    ]
    machines = [document["environment"]["cpu"] for document in (before, after)]
    return {
        "kind": kind,
        "compared": len(shared),
        "only_before": len(old) - len(shared),
        "only_after": len(new) - len(shared),
        "machines": machines,
        "commits": [document["environment"]["commit"] for document in (before, after)],
        "changes": changes,
        "regressions": sum(one["verdict"] == "regression" for one in changes),
        "improvements": sum(one["verdict"] == "improvement" for one in changes),
    }


def _refuse_others(before: Mapping[str, Any], after: Mapping[str, Any], rules: _Rules) -> None:
    for name in rules.same:
        old, new = ({row.get(name) for row in one["rows"]} for one in (before, after))
        if not old & new:
            raise InvalidDataError(
                f"results of different {name} do not compare: {_few(old)} and {_few(new)}"
            )
    for name in rules.same_settings:
        old, new = before["settings"].get(name), after["settings"].get(name)
        if old != new:
            raise InvalidDataError(
                f"results of different settings do not compare: {name} was {old}, is {new}"
            )


def _few(values: set[Any]) -> str:
    return ", ".join(sorted(str(value)[:24] for value in values)[:3])


def _by_identity(document: Mapping[str, Any], rules: _Rules) -> dict[tuple[Any, ...], Any]:
    return {tuple(row.get(name) for name in rules.identity): row for row in document["rows"]}


def _change(
    identity: tuple[Any, ...],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    figure: _Figure,
    rules: _Rules,
    least: float,
) -> dict[str, Any] | None:
    was, now = old.get(figure.name), new.get(figure.name)
    if was is None or now is None:
        return None
    better, worse = (now, was) if figure.is_more_better else (was, now)
    ratio = better / worse if worse else (1.0 if better == worse else float("inf"))
    is_certain = True
    if figure.has_spread:
        (low, high), (other_low, other_high) = (
            (row["spread"]["low"], row["spread"]["high"]) for row in (old, new)
        )
        is_certain = high < other_low or other_high < low
    verdict = "unchanged"
    if is_certain and ratio < 1.0 - least:
        verdict = "regression"
    elif is_certain and ratio > 1.0 + least:
        verdict = "improvement"
    return {
        "row": dict(zip(rules.identity, identity, strict=True)),
        "figure": figure.name,
        "before": was,
        "after": now,
        "ratio": ratio if ratio != float("inf") else None,
        "verdict": verdict,
    }
