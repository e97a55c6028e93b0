"""From the runs of one arm to its row: INTERFACES' fields, then what it takes to doubt them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..runtime.stats import ExpertTraffic
from .records import Bandwidths, Measurement, Subject
from .roofline import Roofline
from .spread import paired_ratio, spread


@dataclass(frozen=True, slots=True)
class Runs:
    """One arm in one state of the caches: what it ran, and each timed repetition in order."""

    arm: str
    budget: str
    is_cold: bool
    subject: Subject
    measurements: Sequence[Measurement]
    pages_kept: float
    has_identical_logits: bool
    memory_limit_bytes: int | None
    fence: str
    agreement: float
    link_limit_bytes_per_s: int | None

    @property
    def moved_bytes_per_s(self) -> float:
        """Experts' bytes over the time of decoding, the median of the repetitions."""
        moved = [one.traffic.get("bytes_on_demand", 0) + one.traffic.get("bytes_prefetched", 0)
                 for one in self.measurements]  # fmt: skip
        pairs = zip(moved, self.measurements, strict=True)
        return median(nbytes / one.decode_s for nbytes, one in pairs)


def link_speed(bandwidths: Sequence[Bandwidths], runs: Sequence[Runs]) -> float:
    """Bytes a second that the link could move: as probed, or what an arm moved if that was more.

    A disk of others' may be several times as fast in one second as in another, and is probed for a
    tenth of one. Buffered reads may be the page cache's, so of them only the probe counts.
    """
    probed = median(one.link_bytes_per_s for one in bandwidths)
    if any(one.reads == "buffered" for one in bandwidths):
        return probed
    moved = max(one.moved_bytes_per_s for one in runs)
    limits = [one.link_limit_bytes_per_s for one in runs if one.link_limit_bytes_per_s is not None]
    return max(probed, min([moved, *limits]))


def make_row(
    runs: Runs,
    *,
    missed_per_token: float,
    bandwidths: Sequence[Bandwidths],
    link_bytes_per_s: float,
    reference: Runs,
    stamp: Mapping[str, Any],
) -> dict[str, Any]:
    """One row. `missed_per_token`: experts that the best LRU of this size misses;
    `link_bytes_per_s` as by `link_speed`.

    `reference` is the arm that speeds are paired with; `stamp` is the same in every row of a run.
    """
    subject, measurements = runs.subject, runs.measurements
    speeds = [one.tokens_per_second for one in measurements]
    speed = spread(speeds)
    pairs = paired_ratio(speeds, [one.tokens_per_second for one in reference.measurements])
    tokens = sum(one.decode_tokens for one in measurements)
    outside = [one.outside_share for one in measurements if one.outside_share is not None]
    traffic = ExpertTraffic.merge(ExpertTraffic(**one.traffic) for one in measurements)
    roofline = Roofline(
        active_bytes=subject.active_bytes,
        missed_bytes=missed_per_token * subject.expert_bytes,
        read_bytes_per_s=median(one.read_bytes_per_s for one in bandwidths),
        link_bytes_per_s=link_bytes_per_s,
    )
    return {
        "arm": runs.arm,
        "format": subject.format,
        "budget": runs.budget,
        "tokens_per_second": speed.median,
        "spread": {
            "low": speed.low,
            "high": speed.high,
            "confidence": speed.confidence,
            "count": speed.count,
        },
        "ttft_s": median(one.ttft_s for one in measurements),
        "bytes_per_token": (traffic.bytes_on_demand + traffic.bytes_prefetched) / tokens,
        "hit_rate": traffic.hit_rate,
        "late_rate": traffic.late_hits / traffic.lookups if traffic.lookups else None,
        "stall_s_per_token": sum(one.stall_s for one in measurements) / tokens,
        "roofline_tokens_per_second": roofline.tokens_per_second,
        "roofline_share": speed.median / roofline.tokens_per_second,
        "rss_peak_bytes": max(one.rss_peak_bytes for one in measurements),
        "outside_products_share": median(outside) if outside else None,
        "cache": "cold" if runs.is_cold else "warm",
        "repetitions": len(measurements),
        "runs_tokens_per_second": speeds,
        "ratio": {"to": reference.arm, **pairs.as_dict()},
        "traffic": traffic.as_dict(),
        "wasted_bytes_per_token": traffic.prefetch_wasted * subject.expert_bytes / tokens,
        "active_bytes_per_token": subject.active_bytes,
        "lru_missed_bytes_per_token": roofline.missed_bytes,
        "read_bytes_per_s": roofline.read_bytes_per_s,
        "link_bytes_per_s": roofline.link_bytes_per_s,
        "probed_link_bytes_per_s": median(one.link_bytes_per_s for one in bandwidths),
        "reads": bandwidths[0].reads,
        "pages_kept": runs.pages_kept,
        "identical_logits": runs.has_identical_logits,
        "token_agreement": runs.agreement,
        "memory_limit_bytes": runs.memory_limit_bytes,
        "memory_fence": runs.fence,
        "link_limit_bytes_per_s": runs.link_limit_bytes_per_s,
        "storage_bytes_per_token": sum(one.read_bytes for one in measurements) / tokens,
        "slots": subject.num_slots,
        "budget_bytes": subject.budget_bytes,
        "expert_bytes": subject.expert_bytes,
        "dtype": subject.dtype,
        "predictor": subject.predictor,
        "prefetch": subject.prefetch,
        "eviction": subject.eviction,
        "device": subject.device,
        "device_name": subject.device_name,
        "threads": subject.num_threads,
        "load_s": subject.load_s,
        "model": subject.model,
        "fingerprint": subject.fingerprint,
        **stamp,
    }
