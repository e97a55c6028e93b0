"""`outrider evaluate`: the prediction table on held-out text, as text, JSON, figures and a page."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from . import options
from .display import print_json, progress_bars
from .startup import heavy_imports

app = typer.Typer(add_completion=False)

# The bench is named by string: the runtime never imports what measures it.
_PACKAGE = "outrider.bench.prediction"
_PIPE_WIDTH = 140
_DEFAULT = "random,frequent,statistics,lookahead"


@app.command()
def evaluate(
    traces: Annotated[list[Path], typer.Argument(help="trace folders of one model")],
    predictor: Annotated[
        list[str] | None,
        typer.Option(
            help="names and folders, with commas; may be repeated. Without training: random, "
            "frequent, cluster, pattern, statistics, lookahead, lookahead-corrected, "
            f"pre-attention, oracle; the others are folders made by outrider train [{_DEFAULT}]"
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=4, help="held-out windows to judge on, spread evenly [all]")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="tokens of each window that come as its prompt")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="of the resamples, and of random")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave damaged shards out instead of stopping")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json, figures and index.html")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="also draw recall and calibration into this PNG file")
    ] = None,
    json: options.Json = False,
) -> None:
    """Judge predictors on held-out documents, called token by token as the engine calls them.

    All figures are of decode steps of the test split. Predictors given by name are fitted to the
    train split first. Recall on misses counts look-ups that an LRU of that size misses.
    """
    names = tuple(part.strip() for each in predictor or [_DEFAULT] for part in each.split(","))
    names = tuple(name for name in names if name)
    if not names:
        raise UsageError("--predictor names nothing; give at least one name or folder")
    with heavy_imports():
        module = _module("evaluate")
    if plot is not None or out is not None:
        _module("figures").require()
    wanted = module.EvaluateOptions(
        traces=tuple(traces),
        predictors=names,
        windows=windows,
        prompt_tokens=prompt_tokens,
        seed=seed,
        skip_bad=skip_bad,
    )
    with progress_bars() as progress:
        document = module.evaluate(wanted, progress=progress)
    if plot is not None:
        _module("figures").plot(document, plot)
    written = [] if out is None else _module("page").write_page(document, out)
    if json:
        print_json(document | {"files": [str(path) for path in written]})
        return
    _print(document)
    if out is not None:
        typer.echo(f"page: {out / 'index.html'}")


def _module(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _print(document: dict[str, Any]) -> None:
    # A pipe has no width, and a table cut to 80 columns says nothing.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("predictor", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in document["rows"]:
        name = row["predictor"] if row["predictor"] != last else ""
        last = row["predictor"]
        table.add_row(name, *_cells(row))
    console.print(table)
    workload, shape = document["workload"], document["shape"]
    misses = ", ".join(f"{rate:.0%} at {name}" for name, rate in document["miss_rate"].items())
    typer.echo(
        f"{document['model']}: {shape['num_moe_layers']} layers of {shape['num_experts']} experts, "
        f"top-{shape['top_k']}. {workload['decode_tokens']} decode tokens of "
        f"{workload['documents']} test documents."
    )
    typer.echo(
        "In percent, 95 % intervals by resampled document. @k, @2k: recall among the k and 2k "
        "highest forecasts; misses: recall@k of the look-ups an LRU with 25 % of the experts "
        f"misses (LRU misses: {misses}); ece: calibration error of the 2k highest; skill: Brier, "
        "over token statistics; us: one call."
    )


_COLUMNS = (
    "when", "top1", "top2", "recall@k", "@2k", "exact", "misses", "ece", "skill", "us", "numbers",
)  # fmt: skip
_WHEN = {"before": "+{}", "in_pass": "l+{}", "pre_attention": "pre {}"}


def _cells(row: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    interval = row["ci"]["recall_at_k"]
    half = "" if interval is None else f"±{50 * (interval[1] - interval[0]):.1f}"
    return [
        _WHEN[row["moment"]].format(row["distance"]),
        percent(row["top1"]),
        percent(row["top2"]),
        percent(row["recall_at_k"]) + half,
        percent(row["recall_at_2k"]),
        percent(row["exact"]),
        percent(row["recall_on_misses"]["25%"]),
        percent(row["ece"]),
        "-" if row["brier_skill"] is None else f"{row['brier_skill']:.2f}",
        f"{row['microseconds']:.0f}",
        f"{row['parameters']:,}",
    ]
