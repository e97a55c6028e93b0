"""`outrider bench kernels`: options and the table."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import OutriderError
from ..sizes import parse_bytes
from . import options as shared
from .display import print_json, progress_bars, stderr_console

_SHAPES = "deepseek-moe-16b,qwen1.5-moe,mixtral-8x7b,olmoe-1b-7b"


class WrongResultError(OutriderError):
    """A kernel computed something else than its definition; it was given no speed."""


def kernels(
    shapes: Annotated[str, typer.Option(help="model sizes, with commas")] = _SHAPES,
    formats: Annotated[
        str, typer.Option(help="of the weights, with commas: fp32, bf16, fp16, int8, int4, nf4")
    ] = "bf16,int8,int4",
    ops: Annotated[
        str, typer.Option(help="expert_mlp, linear, combine: with commas")
    ] = "expert_mlp,linear,combine",
    impls: Annotated[
        str | None,
        typer.Option(
            help="cpu (triton on cuda), torch (its own ops), reference (slow) [all but the last]"
        ),
    ] = None,
    phases: Annotated[str, typer.Option(help="decode, prefill: with commas")] = "decode,prefill",
    all: Annotated[
        bool, typer.Option("--all", help="every format and implementation: minutes")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the activations: fp32, bf16, fp16")] = "bf16",
    arena: Annotated[str, typer.Option(help="slots to walk through, at least")] = "1GiB",
    decode_tokens: Annotated[int, typer.Option(help="tokens of a decode step")] = 1,
    prefill_tokens: Annotated[int, typer.Option(help="tokens of a prompt")] = 256,
    repetitions: Annotated[int, typer.Option(help="timed rounds, everything in turn")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads [torch's own choice]")] = None,
    expected: Annotated[
        str | None,
        typer.Option(help="time nothing: shares calculated for a card (rtx3090), run by no card"),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="measure block sizes for this CUDA card and keep them")
    ] = False,
    tune_out: Annotated[
        Path | None, typer.Option(help="file for the tuned table [the user's cache folder]")
    ] = None,
    json: shared.Json = False,
) -> None:
    """Bandwidth of every op beside a plain read of the same memory, results checked first.

    Weights are cold: calls walk through an arena larger than the caches. Reads, PyTorch's dense
    products and the ops are timed in turn, and the shares are medians of paired ratios. A row
    whose error is above its tolerance gets no speed, and the exit code is 1.
    """
    module = importlib.import_module("outrider.bench.kernels")
    chosen_formats = module.FORMATS if all else _names(formats)
    wanted = module.KernelOptions(
        shapes=_names(shapes),
        formats=chosen_formats,
        ops=_names(ops),
        impls=_names(impls or "") or (module.every_impl(device) if all else ()),
        phases=_names(phases),
        dtype=dtype,
        device=device,
        arena_bytes=parse_bytes(arena),
        decode_tokens=decode_tokens,
        prefill_tokens=prefill_tokens,
        repetitions=repetitions,
        threads=threads,
    )
    if expected is not None:
        wanted.check()
        rows = importlib.import_module("outrider.bench.expectations").expected_rows(
            expected, shapes=wanted.shapes, formats=wanted.formats
        )
        if json:
            print_json({"calculated": True, "rows": rows})
        else:
            _print_expected(rows)
        return
    if tune:
        tuning = importlib.import_module("outrider.bench.tuning")
        with progress_bars() as progress:
            report = tuning.tune(wanted, out=tune_out, progress=progress)
        if json:
            print_json(report)
        else:
            typer.echo(f"{report['path']}: {len(report['entries'])} entries for {report['card']}")
        return
    with progress_bars() as progress:
        document = module.bench_kernels(wanted, progress=progress)
    if json:
        print_json(document)
    else:
        _print_rows(document)
    wrong = module.wrong_rows(document)
    if wrong:
        first = wrong[0]
        raise WrongResultError(
            f"{len(wrong)} of {len(document['rows'])} results are wrong and have no speed; first "
            f"{first['op']} {first['impl']} {first['format']} {first['shape']} {first['phase']}: "
            f"error {first['error']:.2g}, tolerance {first['tolerance']:.2g}"
        )


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _print_rows(document: dict[str, Any]) -> None:
    for phase in ("decode", "prefill"):
        rows = [row for row in document["rows"] if row["phase"] == phase]
        if not rows:
            continue
        table = Table(title=phase, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for heading in ("op", "impl", "format", "shape"):
            table.add_column(heading, no_wrap=True)
        has_expected = any(row["expected"] for row in rows)
        numbers = ["us", "GB/s", "of read", *(["expected*"] if has_expected else [])]
        if phase == "prefill":
            numbers = ["ms", "GFLOP/s", "of matmul"]
        for heading in (*numbers, "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["op"],
                row["impl"],
                row["format"],
                row["shape"],
                *_cells(row, phase=phase, has_expected=has_expected),
                f"{row['error']:.1e}",
            )
        Console(highlight=False).print(table)
    environment = document["environment"]
    typer.echo(
        f"{document['device']}"
        + (f" ({environment['cpu']}, {document['isa']})" if document["isa"] else "")
        + f", threads {document['threads']}; load average "
        + " to ".join(f"{load:.1f}" for load in environment["load_average"])
        + f" on {environment['num_cpus']} processors. Shares are medians of paired ratios: of a "
        "plain read of the same memory; of torch's dense product, fp32 / same dtype."
    )
    if any(row["expected"] for row in document["rows"]):
        typer.echo("* calculated for an RTX 3090, share of its 936 GB/s")
    if document["device"] != "cpu":
        stderr_console().print("Triton kernels had run on no GPU when this version was made")


def _cells(row: dict[str, Any], *, phase: str, has_expected: bool) -> list[str]:
    if not row["is_correct"]:
        return ["wrong", "", "", *([""] if has_expected and phase == "decode" else [])]
    if phase == "prefill":
        shares = " / ".join(f"{100 * share:.0f}%" for share in row["share_of_matmul"].values())
        return [f"{row['microseconds'] / 1000:.1f}", f"{row['gflop_per_s']:.0f}", shares]
    cells = [
        f"{row['microseconds']:.0f}",
        f"{row['gb_per_s']:.1f}",
        f"{100 * row['share_of_read']:.0f}%",
    ]
    if has_expected:
        expected = row["expected"]
        cells.append(f"{100 * expected['share_of_bandwidth']:.0f}%" if expected else "")
    return cells


def _print_expected(rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"calculated for {rows[0]['expected']['card']}, run by no card",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for heading in ("op", "format", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("us", "of bandwidth", "bound"):
        table.add_column(heading, justify="right")
    for row in rows:
        expected = row["expected"]
        table.add_row(
            row["op"],
            row["format"],
            row["shape"],
            f"{1e6 * expected['seconds']:.0f}",
            f"{100 * expected['share_of_bandwidth']:.0f}%",
            expected["bound"],
        )
    Console(highlight=False).print(table)
