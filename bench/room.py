"""Whether the arms of a run have room beside each other: what each holds against what is there.

Knows sizes only and starts nothing. Linux hands out memory that it does not have, so arms that are
too many begin all the same and are killed while they are timed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..runtime.errors import InsufficientMemoryError, UsageError
from ..runtime.sizes import format_bytes, parse_budget, resolve
from .lineup import Arm, external_bytes
from .records import Subject

# What a process of ours takes beside its weights: Python, PyTorch, a predictor. Measured: 0.6 GB,
# of which libraries are shared.
OWN_BYTES = 512 << 20
# What an automatic memory limit leaves beside budget and dense weights: the same, and page cache.
LIMIT_RESERVE_BYTES = 1 << 30


def memory_limit(given: int | str | None, like: Subject) -> int | None:
    """Bytes that each limited arm of a budget may hold; `like` is an arm of ours at that budget."""
    if given == "auto":
        return like.budget_bytes + like.dense_bytes + LIMIT_RESERVE_BYTES
    return None if given is None else int(given)


def at_budget(like: Subject, budget: str, *, available_bytes: int) -> Subject:
    """`like` as it would be at another budget. UsageError for a budget that is none."""
    slot_bytes = like.budget_bytes // like.num_slots
    num_slots = resolve(
        parse_budget(budget),
        slot_bytes=slot_bytes,
        num_experts_total=_num_experts(like),
        # Whether it fits is asked of all arms together.
        available_bytes=1 << 62,
        auto_bytes=available_bytes // 2,
    )
    return replace(like, num_slots=num_slots, budget_bytes=num_slots * slot_bytes)


def require(
    arms: Mapping[str, Arm],
    budget: str,
    like: Subject,
    *,
    limit: int | str | None,
    available_bytes: int,
) -> None:
    """Raise InsufficientMemoryError where `arms` by name need more than `available_bytes` together.

    `like` is an arm of ours at this budget, `limit` as in `memory_limit`; UsageError for one that
    an arm of ours cannot keep. On a GPU slots are taken when they are made, and the engine itself
    refuses.
    """
    if like.device != "cpu":
        return
    _require_within_limit(arms, like, memory_limit(limit, like))
    needs = _needs(arms, like, limit)
    needed = sum(needs.values())
    if needed <= available_bytes:
        return
    told = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in needs.items())
    advice = "name fewer --arms"
    num_experts = _num_experts(like)
    for percent in range(100 * like.num_slots // num_experts - 1, 100 // num_experts, -1):
        smaller = at_budget(like, f"{percent}%", available_bytes=available_bytes)
        if sum(_needs(arms, smaller, limit).values()) <= available_bytes:
            advice += f", or give a smaller --expert-memory ({percent}% fits)"
            break
    raise InsufficientMemoryError(
        f"expert memory {budget}: {len(arms)} arms side by side need {format_bytes(needed)} and "
        f"{format_bytes(available_bytes)} of memory are available: {told} (of ours each its "
        f"experts, {format_bytes(like.dense_bytes)} of dense weights and "
        f"{format_bytes(OWN_BYTES)} for the process); {advice}"
    )


def _require_within_limit(arms: Mapping[str, Arm], like: Subject, limit: int | None) -> None:
    least = like.budget_bytes + like.dense_bytes
    if limit is None or limit >= least:
        return
    for name, arm in arms.items():
        if not arm.is_external and not arm.is_resident:
            raise UsageError(
                f"memory limit {format_bytes(limit)}: arm {name} holds {format_bytes(least)} "
                f"(experts {format_bytes(like.budget_bytes)}, dense weights "
                f"{format_bytes(like.dense_bytes)}); give a larger --memory-limit, auto, or a "
                "smaller --expert-memory"
            )


def _needs(arms: Mapping[str, Arm], like: Subject, limit: int | str | None) -> dict[str, int]:
    whole = at_budget(like, "all", available_bytes=0)

    def need(arm: Arm) -> int:
        if arm.kind == "llama.cpp":
            # Pages of a mapped file are the system's to take back, unless all are to stay.
            size = Path(arm.arguments["file"]).stat().st_size if arm.is_resident else 0
            return size + OWN_BYTES
        if arm.is_external:
            return external_bytes(like, memory_limit(limit, like))
        held = whole if arm.is_resident else like
        return held.budget_bytes + held.dense_bytes + OWN_BYTES

    return {name: need(arm) for name, arm in arms.items()}


def _num_experts(like: Subject) -> int:
    return like.num_moe_layers * like.num_experts
