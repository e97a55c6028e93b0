"""`outrider bench transfer`, and what is done with results: `compare`, `report`, `schema`."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from ..sizes import format_bytes, parse_bytes
from . import options
from .display import print_json, progress_bars

_PACKAGE = "outrider.bench"


def transfer(
    media: Annotated[str, typer.Option(help="disk, memory, link (a GPU's): with commas")] = (
        "disk,memory"
    ),
    blocks: Annotated[
        str, typer.Option(help="block sizes with commas")
    ] = "64KiB,256KiB,1MiB,4MiB,16MiB",
    depths: Annotated[str, typer.Option(help="blocks under way at a time, with commas")] = "1,2,4",
    size: Annotated[str, typer.Option(help="bytes moved for one figure")] = "64MiB",
    repetitions: Annotated[int, typer.Option(min=1, help="timed runs of each, in turn")] = 5,
    file: Annotated[Path | None, typer.Option(help="read this file [one written now]")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="where the file is written [the system's for such]")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the places that are read")] = 0,
    json: options.Json = False,
) -> None:
    """What disk, memory and a GPU's link carry, by block size and blocks at a time.

    Reads of random places go past the page cache where the file system has direct reads. Medians
    with intervals of runs in turn. The default ends within a minute or two.
    """
    module = importlib.import_module(f"{_PACKAGE}.transfer")
    wanted = module.TransferOptions(
        media=tuple(_names(media)),
        blocks=tuple(parse_bytes(one) for one in _names(blocks)),
        depths=tuple(_count(one) for one in _names(depths)),
        bytes_each=parse_bytes(size),
        repetitions=repetitions,
        file=file,
        folder=folder,
        seed=seed,
    )
    with progress_bars() as progress:
        document = module.bench_transfer(wanted, progress=progress)
    if json:
        print_json(document)
        return
    table = _table("medium", "block", "at a time", "GB/s", "interval", "us a block")
    for row in document["rows"]:
        spread = row["spread"]
        table.add_row(
            row["medium"],
            format_bytes(row["block_bytes"]),
            str(row["depth"]),
            f"{row['gb_per_s']:.2f}",
            f"{spread['low']:.2f}-{spread['high']:.2f}",
            f"{row['microseconds_per_block']:.0f}",
        )
    Console(highlight=False).print(table)
    direct = {row["is_direct"] for row in document["rows"] if row["medium"] == "disk"}
    load = document["environment"]["load_average"]
    typer.echo(
        ("Disk: direct reads. " if True in direct else "Disk: buffered. " if direct else "")
        + f"Medians of {repetitions}; load average {load[0]:.1f} to {load[-1]:.1f} on "
        f"{document['environment']['num_cpus']} processors."
    )


def compare(
    before: Annotated[Path, typer.Argument(help="result file, made with --json")],
    after: Annotated[Path, typer.Argument(help="result file of the same benchmark")],
    least: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="smallest relative change that counts")
    ] = 0.01,
    json: options.Json = False,
) -> None:
    """Changes beyond noise from one result to another; exit code 1 if any is a regression.

    A measured figure changed where the two intervals do not meet; a replayed one, where it differs.
    """
    documents = importlib.import_module(f"{_PACKAGE}.documents")
    module = importlib.import_module(f"{_PACKAGE}.compare")
    (old_kind, old), (new_kind, new) = documents.read(before), documents.read(after)
    found = module.compare(old, new, kinds=(old_kind, new_kind), least=least)
    if json:
        print_json(found)
    else:
        _print_changes(found)
    if found["regressions"]:
        raise typer.Exit(1)


def report(
    results: Annotated[
        list[Path], typer.Argument(help="result files made with --json, or folders of them")
    ],
    out: Annotated[Path, typer.Option(help="the HTML file")] = Path("report.html"),
    json: options.Json = False,
) -> None:
    """One HTML page of result files, which needs nothing else: tables, curves, rooflines."""
    module = importlib.import_module(f"{_PACKAGE}.report.page")
    written = module.write_report(results, out)
    if json:
        print_json({"report": str(written), "results": len(module.result_files(results))})
    else:
        typer.echo(f"{written}: {format_bytes(written.stat().st_size)}")


def schema(
    kind: Annotated[str, typer.Argument(help="hit-rate, simulate, fit, decode, transfer, ...")],
) -> None:
    """The JSON schema of a benchmark's document."""
    print_json(importlib.import_module(f"{_PACKAGE}.documents").schema(kind))


def _print_changes(found: dict[str, Any]) -> None:
    shown = [one for one in found["changes"] if one["verdict"] != "unchanged"]
    if shown:
        table = _table("row", "figure", "before", "after", "ratio", "verdict", folded=("row",))
        for one in shown:
            ratio = one["ratio"]
            table.add_row(
                ", ".join(str(value) for value in one["row"].values()),
                one["figure"],
                f"{one['before']:.5g}",
                f"{one['after']:.5g}",
                "" if ratio is None else f"{ratio:.3f}",
                one["verdict"],
            )
        Console(highlight=False).print(table)
    typer.echo(
        f"{found['compared']} rows compared: {found['regressions']} regressions, "
        f"{found['improvements']} improvements; a ratio above 1 is better. Without a partner: "
        f"{found['only_before']} before, {found['only_after']} after."
    )
    if found["machines"][0] != found["machines"][1]:
        typer.echo(f"The machines differ: {found['machines'][0]}, then {found['machines'][1]}.")


def _table(*headings: str, folded: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="right" if index > 1 else "left",
            no_wrap=heading not in folded,
            overflow="fold",
        )
    return table


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"depths: {text!r}; accepted are whole numbers from 1, with commas")
    return int(text)
