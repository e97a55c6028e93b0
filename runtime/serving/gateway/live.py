"""What the page at / is told once a second: a STATS message as a small JSON document."""

from typing import Any

from ..messages import Ready, Stats

_STATES = {
    "stalled": "the engine has made no progress for a while",
    "failing": "experts cannot be read",
    "draining": "the server is shutting down and takes no new requests",
    "dead": "the engine has ended",
}


def live_document(ready: Ready, stats: Stats) -> dict[str, Any]:
    """The figures of the page. Counters as they are: the page makes rates of two answers."""
    residency = None
    if stats.num_moe_layers * stats.num_experts == len(stats.residency) > 0:
        residency = {
            "layers": stats.num_moe_layers,
            "experts": stats.num_experts,
            "states": "".join(str(min(state, 3)) for state in stats.residency),
        }
    return {
        "model": ready.model.name,
        "boot": stats.instance,
        "is_ready": stats.is_ready,
        "is_degraded": stats.degraded,
        "notice": _STATES.get(stats.state),
        "uptime_s": stats.uptime_seconds,
        "running": stats.requests_running,
        "waiting": stats.requests_waiting,
        "generation_tokens": stats.generation_tokens_total,
        "lookups": {
            result: stats.expert_lookups_total.get(result, 0) for result in ("hit", "late", "miss")
        },
        "transfer_bytes": sum(stats.expert_transfer_bytes_total.values()),
        "stall_s": stats.expert_stall_seconds_total,
        "residency": residency,
    }
