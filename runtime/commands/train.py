"""`outrider train`: a predictor learned from traces, into a folder that `--predictor` takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import options
from .display import print_json, progress_bars, stderr_console
from .startup import heavy_imports
from .sweep import Search, make_search, search

app = typer.Typer(add_completion=False)

SMALL_WIDTH = 256
"""Products of networks up to this width are over before a second thread is awake."""


def _sized(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Network", show_default=False)


def _trained(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Training", show_default=False)


def _swept(help_text: str, **more: Any) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Sweep", show_default=False, **more)


@app.command()
def train(
    traces: Annotated[list[Path], typer.Argument(help="trace folders of one model")],
    predictor: Annotated[
        str | None,
        typer.Option(
            help="hierarchical, attention, ensemble (needs collect --hidden-states all); also "
            "statistics, cluster, frequent, pattern, lookahead-corrected, pre-attention"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder for the predictor")] = None,
    preset: Annotated[
        str, typer.Option(help="small, large, rtx3090 or a6000; other options override it")
    ] = "small",
    resume: Annotated[bool, typer.Option(help="go on with what the folder has begun")] = False,
    json: options.Json = False,
    features: Annotated[
        str | None, _trained("hidden, or routing: without hidden states [hidden]")
    ] = None,
    context: Annotated[int | None, _trained("past tokens that are looked at [4]")] = None,
    horizon: Annotated[int | None, _trained("furthest token forecast, 1 or 2 [2]")] = None,
    loss: Annotated[str | None, _trained("bce, softmax or focal [bce]")] = None,
    curriculum: Annotated[str | None, _trained("none or frequent-first [none]")] = None,
    balanced: Annotated[bool | None, _trained("weigh rare experts up [no]")] = None,
    auxiliary_weight: Annotated[
        float | None, _trained("of the cluster head's or confidence head's loss [0.1]")
    ] = None,
    lr: Annotated[float | None, _trained("learning rate [by preset]")] = None,
    weight_decay: Annotated[float | None, _trained("of AdamW [0.015]")] = None,
    dropout: Annotated[float | None, _trained("share of units left out [by preset]")] = None,
    clip: Annotated[float | None, _trained("largest norm of a gradient [0.5]")] = None,
    epochs: Annotated[int | None, _trained("passes over the traces [by preset]")] = None,
    patience: Annotated[int | None, _trained("epochs without gain until it stops [2]")] = None,
    batch_size: Annotated[int | None, _trained("tokens a step [by preset]")] = None,
    precision: Annotated[str | None, _trained("no, bf16 or fp16 [by preset]")] = None,
    checkpointing: Annotated[
        bool | None, _trained("gradient checkpointing: less memory, more time [no]")
    ] = None,
    width: Annotated[int | None, _sized("of the encoder [by preset]")] = None,
    layers: Annotated[int | None, _sized("of the encoder [by preset]")] = None,
    heads: Annotated[int | None, _sized("of attention [by preset]")] = None,
    clusters: Annotated[int | None, _sized("groups of experts a layer [8]")] = None,
    seed: Annotated[int | None, _trained("one seed gives one result on a CPU [0]")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="training tokens to read, evenly over the traces [all]"),
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [1 for widths up to 256, else all]")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave damaged shards out instead of stopping")
    ] = False,
    sweep: Annotated[
        Path | None, _swept("YAML file of options that vary: train many, keep the best")
    ] = None,
    trials: Annotated[int | None, _swept("trainings in all, resumed ones included", min=1)] = None,
    workers: Annotated[int | None, _swept("trials at a time [1; on a cluster all]", min=1)] = None,
    engine: Annotated[str | None, _swept("local, or ray: workers of a Ray cluster [local]")] = None,
    address: Annotated[
        str | None, _swept("running Ray cluster: HOST:PORT or auto [one of this machine's own]")
    ] = None,
) -> None:
    """Train a predictor on the train split of traces, stopping by their validation split.

    OUT then holds config.json, model.safetensors, metrics.jsonl and curves.png; give it to
    `outrider evaluate` and to `--predictor` of generate, serve and bench. Several processes:
    `accelerate launch --no_python outrider train ...` or `torchrun --no-python ...`.
    With --sweep OUT holds a folder a trial, a table and a figure of all, and `best`.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    wanted = make_search(given)
    if predictor is None and wanted is None:
        raise UsageError("no predictor named: give --predictor, such as hierarchical")
    if out is None:
        raise UsageError("no folder for the predictor: give --out DIR")
    from ...predictors.base import family_class
    from ...predictors.presets import Settings, make_settings

    if predictor is not None:
        family_class(predictor)
    own = {name: given[name] for name in Settings.__struct_fields__ if name in given}
    del own["preset"]
    settings = make_settings(preset, own)
    if wanted is not None:
        _sweep(wanted, given, own, is_json=json)
        return
    assert predictor is not None
    with heavy_imports():
        import torch

        from ...collect.trace import open_traces
        from ...predictors.fit import Run, train_into
    if num_threads is not None or settings.width <= SMALL_WIDTH:
        torch.set_num_threads(num_threads or 1)
    readers = open_traces(traces, skip_bad=skip_bad)
    run = Run(predictor, settings, out, resume=resume, max_tokens=max_tokens)
    with progress_bars() as progress:
        document = train_into(run, readers, tell=progress)
    if int(os.environ.get("RANK", "0")):
        return
    curves = _draw(out)
    if json:
        print_json(
            {"predictor": str(out), **document, "curves": None if curves is None else str(curves)}
        )
        return
    _print(document, out)


def _sweep(wanted: Search, given: dict[str, Any], own: dict[str, Any], *, is_json: bool) -> None:
    from ...predictors.space import PREDICTOR, make_space, read_space

    fixed = own | {name: given[name] for name in (PREDICTOR,) if name in given}
    space = make_space(read_space(wanted.space), preset=given["preset"], given=fixed)
    if PREDICTOR not in space and PREDICTOR not in fixed:
        raise UsageError(
            "no predictor named: give --predictor, such as hierarchical, or let it vary in "
            f"{wanted.space}"
        )
    with heavy_imports():
        from ...predictors.trial import Sweep
    widths = space["width"].ends() if "width" in space else (own.get("width", SMALL_WIDTH),)
    is_small = (wanted.workers or 1) > 1 or max(widths) <= SMALL_WIDTH
    search(
        wanted,
        Sweep(
            space=space,
            traces=tuple(path.resolve() for path in given["traces"]),
            folder=given["out"].resolve(),
            trials=wanted.trials,
            preset=given["preset"],
            given=fixed,
            resume=given["resume"],
            max_tokens=given.get("max_tokens"),
            skip_bad=given["skip_bad"],
            num_threads=given.get("num_threads") or (1 if is_small else os.cpu_count() or 1),
        ),
        json=is_json,
        draw=_draw_trials,
    )


def _draw(out: Path) -> Path | None:
    from ...predictors.curves import draw_curves
    from ...predictors.journal import Journal

    return _drawn(lambda: draw_curves(Journal(out, resume=True).lines(), out))


def _draw_trials(rows: list[dict[str, Any]], out: Path) -> Path | None:
    from ...predictors.curves import draw_trials

    return _drawn(lambda: draw_trials(rows, out))


def _drawn(draw: Callable[[], Path | None]) -> Path | None:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        return draw()
    except ModuleNotFoundError:
        stderr_console().print("no curves drawn: pip install 'outrider[plots]'", markup=False)
        return None


def _print(document: dict[str, Any], out: Path) -> None:
    training, metrics = document["training"], document["metrics"]
    typer.echo(
        f"{document['family']}: {training['parameters']:,} numbers, learned from "
        f"{training['train_tokens']:,} tokens in {training['seconds']:.0f} s, in {out}"
    )
    for horizon in (1, 2):
        recall = metrics.get(f"validation_recall_at_k_{horizon}")
        if recall is not None:
            typer.echo(
                f"horizon {horizon}: recall@k {recall:.1%} on "
                f"{training['validation_tokens']:,} validation tokens"
            )
    typer.echo(f"next: outrider evaluate TRACES --predictor statistics,{out}")
