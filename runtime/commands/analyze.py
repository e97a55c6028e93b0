"""`outrider analyze`: expert analysis of traces as JSON, figures and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from . import options
from .display import print_json, progress_bars

app = typer.Typer(add_completion=False)

SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="leave damaged shards out instead of stopping")
]


@app.command()
def analyze(
    traces: Annotated[list[Path], typer.Argument(help="trace folders of one model")],
    out: Annotated[Path, typer.Option(help="folder for the analysis")],
    clusters: Annotated[int, typer.Option(min=0, help="groups of experts; 0 for none")] = 8,
    seed: Annotated[int, typer.Option(help="of the groups' random starts")] = 0,
    skip_bad: SkipBad = False,
    json: options.Json = False,
) -> None:
    """Say how a model routes: usage, entropy, pairs, specialization, reuse, drift, groups of
    experts.

    Writes expert_analysis.json, figures/*.png, expert_contexts.txt and index.html into OUT.
    """
    from ...collect.analysis import analyze as analyze_traces
    from ...collect.analysis.page import write_report
    from ...collect.trace import open_traces

    readers = open_traces(traces, skip_bad=skip_bad)
    with progress_bars() as report:
        analysis = analyze_traces(
            readers,
            num_clusters=clusters,
            seed=seed,
            progress=lambda done, total: report("reading traces", done, total),
        )
    written = write_report(analysis, out)
    if json:
        print_json(
            {
                "out": str(out),
                "files": [str(path) for path in written],
                "model": analysis.model,
                "traces": analysis.traces,
                "tokens": analysis.tokens,
                "skipped_shards": analysis.skipped_shards,
                "datasets": msgspec.to_builtins(analysis.datasets),
                "overall": msgspec.to_builtins(analysis.overall),
            }
        )
        return
    overall, shape = analysis.overall, analysis.shape
    most, least = overall.most_used, overall.least_used
    typer.echo(f"{analysis.model}: {analysis.traces} traces, {analysis.tokens} tokens")
    typer.echo(
        f"experts used {overall.experts_used}/{shape.num_routed_experts} ({overall.coverage:.1%}), "
        f"{overall.experts_per_layer:.1f} a layer; routing entropy "
        f"{overall.routing_entropy:.2f} bits; {overall.unique_pairs} unique pairs"
    )
    typer.echo(
        f"most used expert {most[0]}:{most[1]} ({most[2]:.1%} of tokens), "
        f"least used {least[0]}:{least[1]} ({least[2]:.1%})"
    )
    typer.echo(f"page: {out / 'index.html'}")
