"""`outrider compare`: traces of several models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..errors import UsageError
from . import options
from .analyze import SkipBad
from .display import print_json, print_rows, progress_bars

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    traces: Annotated[list[Path], typer.Argument(help="a trace folder a model, two or more")],
    out: Annotated[Path, typer.Option(help="folder for the comparison")],
    skip_bad: SkipBad = False,
    json: options.Json = False,
) -> None:
    """Compare how models route, on a scale that allows for their number of experts.

    Writes comparison.json, figures/comparison.png and index.html into OUT.
    """
    from ...collect.analysis import analyze
    from ...collect.analysis.page import write_comparison_report
    from ...collect.trace import open_traces

    names = _names(traces)
    with progress_bars() as report:
        analyses = {
            name: analyze(
                open_traces([folder], skip_bad=skip_bad),
                num_clusters=0,
                progress=lambda done, total, name=name: report(f"reading {name}", done, total),
            )
            for name, folder in zip(names, traces, strict=True)
        }
    comparison, written = write_comparison_report(analyses, out)
    rows = msgspec.to_builtins(comparison.rows)
    if json:
        print_json({"out": str(out), "files": [str(path) for path in written], "rows": rows})
        return
    columns = {
        "name": "traces",
        "num_experts": "experts",
        "top_k": "top-k",
        "routing_entropy": "entropy",
        "normalized_entropy": "of most",
        "gini": "Gini",
        "previous_skill": "repeats",
    }
    print_rows(rows, columns=columns)
    typer.echo(f"page: {out / 'index.html'}")


def _names(folders: list[Path]) -> list[str]:
    if len(set(folders)) < max(len(folders), 2):
        raise UsageError(
            f"{len(set(folders))} different folder given; a comparison needs two or more"
        )
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
