"""`outrider train --sweep`: trials in this process, in several of this machine, or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import OutriderError, UsageError
from .display import print_json, progress_bars, stderr_console

if TYPE_CHECKING:
    from ...predictors.trial import Sweep


@dataclass(frozen=True, slots=True)
class Search:
    """How a sweep is run: the space's file, how many trials, and where."""

    space: Path
    trials: int
    engine: str
    address: str | None
    workers: int | None


def make_search(given: Mapping[str, Any]) -> Search | None:
    """The sweep that the options of `train` ask for, if any. UsageError for contradictions."""
    engine = given.get("engine", "local")
    if engine not in ("local", "ray"):
        raise UsageError(f"engine {engine!r}; accepted are local, ray")
    if "sweep" not in given:
        for name in ("trials", "workers", "engine", "address"):
            if name in given:
                raise UsageError(f"--{name} is for sweeps; add --sweep space.yaml")
        return None
    if engine == "local" and "address" in given:
        raise UsageError("--address is for workers of a cluster; add --engine ray")
    if "RANK" in os.environ:
        raise UsageError(
            "each trial of a sweep is one process's; start it without torchrun or accelerate launch"
        )
    if "trials" not in given:
        raise UsageError("a sweep needs its number of trials: give --trials N")
    return Search(
        given["sweep"], given["trials"], engine, given.get("address"), given.get("workers")
    )


def search(
    wanted: Search, sweep: Sweep, *, json: bool, draw: Callable[[Any, Path], Path | None]
) -> None:
    """Run what is missing of a sweep and print its trials. Blocks for minutes to days."""
    # Asked for first: without it nothing is made.
    import optuna  # noqa: F401

    from ...predictors.sweep import run_sweep

    told = stderr_console()
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars())
        executor, workers = _executor(stack, wanted, progress)

        def ended(row: dict[str, Any]) -> None:
            progress("trials", row["trial"] + 1, sweep.trials)
            told.print(_line(row), markup=False)

        try:
            document = run_sweep(sweep, executor=executor, workers=workers, told=ended)
        except BrokenProcessPool:
            raise OutriderError(
                "a trial's process was killed, as for want of memory; go on with --resume"
            ) from None
    figure = draw(document["trials"], sweep.folder)
    if json:
        print_json({**document, "figure": None if figure is None else str(figure)})
        return
    _print(document)


def _executor(
    stack: ExitStack, wanted: Search, progress: Callable[[str, int, int], None]
) -> tuple[Executor, int]:
    from ...predictors.sweep import Here

    if wanted.engine == "local":
        workers = wanted.workers or 1
        if workers == 1:
            return Here(progress), 1
        from ..processes import process_pool

        return stack.enter_context(process_pool(workers)), workers
    from ..scaleout.cluster import connected
    from ..scaleout.executor import ClusterExecutor

    cluster = stack.enter_context(connected(wanted.address, num_workers=wanted.workers or 1))
    gpus = 1 if cluster.gpus else 0
    workers = wanted.workers or (cluster.gpus if gpus else cluster.cpus)
    return stack.enter_context(ClusterExecutor(cluster, gpus=gpus)), workers


def _line(row: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name} {_shown(value)}" for name, value in row["options"].items())
    return (
        f"trial {row['trial']} {row['state']}: recall@k {_share(row['recall'])} "
        f"in {row['seconds']:.0f} s; {options}"
        + ("" if row["error"] is None else f"; {row['error']}")
    )


def _print(document: Mapping[str, Any]) -> None:
    rows = document["trials"]
    names = list(rows[0]["options"])
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("trial", "state", "recall@k", "epochs", "seconds", *names):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    best = document["best"]
    for row in sorted(rows, key=lambda row: (row["state"] != "complete", -(row["recall"] or 0.0))):
        table.add_row(
            str(row["trial"]),
            "best" if row is best or row["trial"] == best["trial"] else row["state"],
            _share(row["recall"]),
            str(len(row["recall_by_epoch"])),
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            *(_shown(row["options"].get(name)) for name in names),
        )
    Console(highlight=False).print(table)
    typer.echo(
        f"best: trial {best['trial']}, recall@k {_share(best['recall'])} on validation documents, "
        f"in {best['folder']}"
    )
    typer.echo(f"next: outrider evaluate TRACES --predictor statistics,{document['sweep']}/best")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
