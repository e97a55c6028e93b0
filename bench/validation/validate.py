"""`outrider bench validate`: the simulator's tokens per second beside this machine's own."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ...runtime.errors import UsageError
from ..arm import EngineArm
from ..environment import environment
from ..records import Passage
from ..spread import spread
from ..workload import BUILT_IN, make_passages, read_texts
from .configurations import Configuration, calibrated_on, unseen
from .machine import Observation, observe
from .model import Simulated, calibrate, forecasts, simulate

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """`geometry` is a folder made by `bench make-geometry`, None for the built-in model alone."""

    geometry: str | None = None
    passages: int = 2
    tokens: int = 40
    prompt_tokens: int = 16
    repetitions: int = 5
    geometry_tokens: int = 12
    geometry_repetitions: int = 3


def bench_validate(options: ValidateOptions, *, progress: Progress) -> dict[str, Any]:
    """Run all configurations, calibrate on the first three, simulate all. Blocks for minutes.

    UsageError for a geometry folder that is not there.
    """
    if options.geometry is not None and not (Path(options.geometry) / "config.json").is_file():
        raise UsageError(
            f"geometry: {options.geometry!r} holds no config.json; outrider bench make-geometry "
            "--hidden 1024 --expert 704 --out DIR makes one"
        )
    around = environment()
    known, others = calibrated_on(options.geometry), unseen(options.geometry)
    texts = read_texts(BUILT_IN, options.passages)
    encoder = EngineArm(model=None, options={"expert_memory": "25%", "prefetch": "off"})
    encoder.load()
    try:
        passages = {
            tokens: make_passages(
                texts,
                encoder.encode,
                num_tokens=tokens,
                prompt_tokens=options.prompt_tokens,
                follows_text=True,
            )
            for tokens in {options.tokens, options.geometry_tokens}
        }
    finally:
        encoder.close()
    seen = _observed([*known, *others], passages, options, progress=progress)
    total = len(seen)
    told = [forecasts(one) for one in seen]
    interruption = next(one.interruption for one in seen if one.interruption is not None)
    machine = calibrate(seen[: len(known)], told[: len(known)], interruption)
    rows = []
    for index, (one, said) in enumerate(zip(seen, told, strict=True)):
        progress("simulating", index, total)
        rows.append(_row(one, simulate(machine, one, said), is_calibration=index < len(known)))
    progress("simulating", total, total)
    errors = [abs(row["error"]) for row in rows if not row["is_calibration"]]
    return {
        "bench": "validate",
        "environment": around.ended().as_dict(),
        "settings": {
            "passages": options.passages,
            "tokens": options.tokens,
            "geometry_tokens": options.geometry_tokens,
            "prompt_tokens": options.prompt_tokens,
            "threads": 1,
            "calibrated_on": [one.name for one in known],
        },
        "calibration": machine.as_dict(),
        "worst_error": max(errors),
        "median_error": median(errors),
        "rows": rows,
    }


def _observed(
    configurations: list[Configuration],
    passages: dict[int, list[Passage]],
    options: ValidateOptions,
    *,
    progress: Progress,
) -> list[Observation]:
    """All of them, in their order; those of one model in turns."""
    found: dict[Configuration, Observation] = {}
    for is_large in (False, True):
        some = [one for one in configurations if (one.model is not None) == is_large]
        if not some:
            continue
        tokens = options.geometry_tokens if is_large else options.tokens
        seen = observe(
            some,
            passages[tokens],
            repetitions=options.geometry_repetitions if is_large else options.repetitions,
            progress=lambda done, total: progress("running", done, total),
        )
        found |= dict(zip(some, seen, strict=True))
    return [found[one] for one in configurations]


def _row(seen: Observation, simulated: Simulated, *, is_calibration: bool) -> dict[str, Any]:
    one: Configuration = seen.configuration
    speed = spread(seen.tokens_per_second)
    steps = [step for steps in seen.repetitions for step in steps]
    return {
        "name": one.name,
        "model": "nano" if one.model is None else "geometry",
        "format": seen.subject.format,
        "budget": one.budget,
        "eviction": one.eviction,
        "predictor": seen.subject.predictor,
        "prefetch": one.prefetch,
        "throttle_bytes_per_s": one.throttle_bytes_per_s,
        "is_calibration": is_calibration,
        "measured_tokens_per_second": speed.median,
        "spread": {
            "low": speed.low,
            "high": speed.high,
            "confidence": speed.confidence,
            "count": speed.count,
        },
        "simulated_tokens_per_second": simulated.tokens_per_second,
        "error": simulated.tokens_per_second / speed.median - 1.0,
        "measured_stall_s": sum(step.stall_s for step in steps) / len(steps),
        "simulated_stall_s": simulated.stall_s,
        "measured_misses": sum(step.misses for step in steps) / len(steps),
        "simulated_misses": simulated.misses,
        "slots": seen.subject.num_slots,
        "expert_bytes": seen.subject.expert_bytes,
        "read": asdict(seen.reads),
        "call": asdict(seen.calls),
    }
