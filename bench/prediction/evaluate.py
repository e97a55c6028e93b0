"""`outrider evaluate`: candidates over the held-out windows, and the document that comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...collect.trace import TraceReader, open_traces
from ...predictors import metrics
from ..environment import environment
from .candidates import REFERENCE, Candidate, Candidates
from .judge import Judge, Judged
from .misses import BUDGETS, missed_look_ups
from .replay import BEFORE, HORIZONS, IN_PASS, Kind, WindowReplay
from .rows import Context, make_row
from .windows import HeldOut, read_windows

PROMPT_TOKENS = 4
"""As many as the context of the predictors, so that none is judged on a context it has not got."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to judge: trace folders of one model, names or folders of predictors, how much text."""

    traces: tuple[Path, ...]
    predictors: tuple[str, ...]
    windows: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    seed: int = 0
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    candidate: Candidate
    judged: dict[Kind, Judged]
    microseconds: dict[str, float]
    slow_microseconds: dict[str, float]


def evaluate(options: EvaluateOptions, *, progress: Progress | None = None) -> dict[str, Any]:
    """The document of `outrider evaluate`; blocks for the whole measurement, on one thread.

    UsageError, InvalidDataError, CollectError or PredictorError before anything is measured.
    """
    import torch

    tell = progress or (lambda what, done, total: None)
    readers = open_traces(options.traces, skip_bad=options.skip_bad)
    maker = Candidates(readers, seed=options.seed, tell=tell)
    candidates = [maker.of(name) for name in dict.fromkeys(options.predictors)]
    for candidate in candidates:
        maker.refuse_missing_states(candidate.name, candidate.hidden_layers)
    layers = sorted({layer for candidate in candidates for layer in candidate.hidden_layers})
    held_out = read_windows(
        readers,
        hidden_layers=layers,
        prompt_tokens=options.prompt_tokens,
        limit=options.windows,
    )
    around = environment()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        replays = {
            candidate.name: _replay(candidate, held_out, readers[0], options, tell)
            for candidate in candidates
        }
        reference = replays.get(REFERENCE) or _replay(
            maker.of(REFERENCE), held_out, readers[0], options, tell
        )
    finally:
        torch.set_num_threads(threads)
    context = _context(held_out, readers[0], reference, options)
    return _document(readers, held_out, list(replays.values()), context, options, around.ended())


def _replay(
    candidate: Candidate,
    held_out: HeldOut,
    reader: TraceReader,
    options: EvaluateOptions,
    tell: Progress,
) -> _Outcome:
    shape = reader.shape
    replay = WindowReplay(shape, prompt_tokens=options.prompt_tokens, moment=candidate.moment)
    kinds = [(BEFORE, horizon) for horizon in HORIZONS]
    kinds += [(candidate.moment, distance) for distance in range(shape.num_moe_layers)]
    judges = {kind: Judge(shape) for kind in kinds}
    for done, window in enumerate(held_out.windows):
        tell(f"judging {candidate.name}", done, len(held_out.windows))
        tables = replay.run(candidate.make(), window)
        for kind, judge in judges.items():
            targets = window.topk_ids[options.prompt_tokens :]
            judge.add(tables.get(kind), targets, window.document)
    tell(f"judging {candidate.name}", len(held_out.windows), len(held_out.windows))
    judged = {kind: judge.judged() for kind, judge in judges.items()}
    spans = {BEFORE: replay.timings.before, candidate.moment: replay.timings.in_pass}
    return _Outcome(
        candidate,
        {kind: one for kind, one in judged.items() if one.is_forecast.any()},
        {moment: median(times) / 1e3 for moment, times in spans.items() if times},
        {moment: float(np.quantile(times, 0.99)) / 1e3 for moment, times in spans.items() if times},
    )


def _context(
    held_out: HeldOut, reader: TraceReader, reference: _Outcome, options: EvaluateOptions
) -> Context:
    missed = {
        name: np.concatenate(
            missed_look_ups(
                held_out.windows, reader.shape, share=share, prompt_tokens=options.prompt_tokens
            )
        )
        for name, share in BUDGETS.items()
    }
    errors = {}
    for horizon in HORIZONS:
        judged = reference.judged.get((BEFORE, horizon))
        first = reference.judged[BEFORE, 1]
        said = first if judged is None else judged
        errors[horizon] = np.where(said.is_forecast, said.column("brier"), np.nan)
    return Context(
        metrics.Bootstrap(held_out.num_documents, seed=options.seed),
        held_out.num_documents,
        missed,
        errors,
    )


def _document(
    readers: Sequence[TraceReader],
    held_out: HeldOut,
    outcomes: Sequence[_Outcome],
    context: Context,
    options: EvaluateOptions,
    around: Any,
) -> dict[str, Any]:
    manifest = readers[0].manifest
    shape = manifest.shape
    decoded = held_out.num_tokens - options.prompt_tokens * len(held_out.windows)
    workload = {
        "windows": len(held_out.windows),
        "documents": held_out.num_documents,
        "decode_tokens": decoded,
        "prompt_tokens": options.prompt_tokens,
        "split": "test",
        "datasets": sorted({name for reader in readers for name in reader.dataset_names}),
    }
    stamp = {
        "model": manifest.model,
        "fingerprint": shape.fingerprint,
        "format": manifest.format,
        "dtype": manifest.dtype,
        "device": "cpu",
        "threads": 1,
        "workload": workload,
        "seed": options.seed,
        "confidence": metrics.CONFIDENCE,
        **around.stamp(),
    }
    rows = []
    for outcome in outcomes:
        fallback = outcome.judged.get((BEFORE, 1))
        for kind, judged in outcome.judged.items():
            moment, distance = kind
            measured = make_row(kind, judged, context=context, fallback=fallback)
            rows.append(
                {
                    "predictor": outcome.candidate.name,
                    "moment": moment,
                    "distance": distance,
                    **measured,
                    "microseconds": outcome.microseconds[moment],
                    "microseconds_p99": outcome.slow_microseconds[moment],
                    "parameters": outcome.candidate.parameters,
                    "fitted_on": outcome.candidate.fitted_on,
                    **stamp,
                }
            )
    return {
        "environment": around.as_dict(),
        "model": manifest.model,
        "shape": {
            name: getattr(shape, name)
            for name in ("num_moe_layers", "num_experts", "top_k", "hidden_size", "fingerprint")
        },
        "workload": workload,
        "reference": REFERENCE,
        "miss_rate": {name: float(one.mean()) for name, one in context.is_missed.items()},
        "rows": rows,
    }


def moments_of(document: dict[str, Any]) -> list[str]:
    """Moments in the order in which they are shown."""
    order = (BEFORE, IN_PASS)
    found = list(dict.fromkeys(row["moment"] for row in document["rows"]))
    return sorted(found, key=lambda one: order.index(one) if one in order else len(order))
