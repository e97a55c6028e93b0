"""Requests into the figures of `vllm bench serve`, under its names and by its definitions.

ttft: first token; tpot: the rest of a request's time over its other tokens; itl: from one CHUNK to
the next; e2el: the whole request. Milliseconds; percentiles as numpy interpolates them.
"""

from collections.abc import Sequence
from statistics import mean, median, pstdev
from typing import Any

import numpy as np

from .load import Load, Taken


def tpot_s(taken: Taken) -> float:
    """Seconds for each token after the first."""
    return (taken.times_s[-1] - taken.times_s[0]) / max(1, len(taken.token_ids) - 1)


def figures(loads: Sequence[Load]) -> dict[str, Any]:
    """One row's figures over all repetitions of a level; throughputs are over their sum of time."""
    taken = [one for load in loads for one in load.taken]
    done = [one for one in taken if one.error is None]
    duration_s = sum(load.duration_s for load in loads)
    num_input = sum(len(one.prompt.token_ids) for one in done)
    num_output = sum(len(one.token_ids) for one in done)
    row: dict[str, Any] = {
        "duration": duration_s,
        "num_prompts": len(taken),
        "completed": len(done),
        "failed": len(taken) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "errors": sorted({one.error for one in taken if one.error is not None}),
    }
    samples = {
        "ttft": [one.times_s[0] for one in done],
        "tpot": [tpot_s(one) for one in done if len(one.token_ids) > 1],
        "itl": [
            later - earlier
            for one in done
            for earlier, later in zip(one.times_s, one.times_s[1:], strict=False)
        ],
        "e2el": [one.latency_s for one in done],
    }
    for name, seconds in samples.items():
        values = [1000 * one for one in seconds] or [0.0]
        row[f"mean_{name}_ms"] = mean(values)
        row[f"median_{name}_ms"] = median(values)
        row[f"std_{name}_ms"] = pstdev(values)
        row[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    return row


def experts(loads: Sequence[Load]) -> dict[str, Any]:
    """What the level read and found, by the server's own counters; bytes a generated token."""

    def gained(name: str, key: str) -> int:
        return sum(getattr(one.after, name)[key] - getattr(one.before, name)[key] for one in loads)

    num_tokens = sum(
        one.after.generation_tokens_total - one.before.generation_tokens_total for one in loads
    )
    looked = {key: gained("expert_lookups_total", key) for key in ("hit", "late", "miss")}
    num_bytes = {
        key: gained("expert_transfer_bytes_total", key) for key in ("on_demand", "prefetch")
    }
    num_lookups = sum(looked.values())
    stall_s = sum(
        one.after.expert_stall_seconds_total - one.before.expert_stall_seconds_total
        for one in loads
    )
    return {
        "lookups": num_lookups,
        "lookups_per_token": num_lookups / num_tokens if num_tokens else 0.0,
        "hit_rate": looked["hit"] / num_lookups if num_lookups else None,
        "late_rate": looked["late"] / num_lookups if num_lookups else None,
        "bytes_on_demand": num_bytes["on_demand"],
        "bytes_prefetched": num_bytes["prefetch"],
        "bytes_per_token": sum(num_bytes.values()) / num_tokens if num_tokens else 0.0,
        "stall_s_per_token": stall_s / num_tokens if num_tokens else 0.0,
    }
