"""How commands speak to people: progress and summaries on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..sizes import format_bytes
from ..stats import ExpertTraffic, GenerationStats


def stderr_console() -> Console:
    """A console on stderr that honours NO_COLOR and draws no bars off a terminal."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """`report(what, done, total)`: one bar per `what`, on a terminal only."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        console=stderr_console(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def print_json(document: Mapping[str, object]) -> None:
    """One JSON document, the last thing on stdout."""
    typer.echo(json.dumps(document, ensure_ascii=False))


def print_rows(rows: Iterable[Mapping[str, object]], *, columns: Mapping[str, str]) -> None:
    """A table on stdout; `columns` maps keys to headings."""
    table = Table()
    for heading in columns.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console(highlight=False).print(table)


def summary(stats: GenerationStats, *, num_tokens: int) -> str:
    """Speed and expert traffic of a generation in two lines."""
    timings, experts = stats.timings, stats.experts
    speed = timings.decode_tokens_per_s
    share = 100 * experts.slots / experts.total
    first = (
        f"{num_tokens} tokens"
        + (f", {speed:.1f} tokens/s decoding" if speed else "")
        + f"; first after {timings.ttft_s:.2f} s, loaded in {timings.load_s:.2f} s"
        + f"; waited {timings.stall_s:.2f} s for experts"
    )
    second = (
        f"experts: {experts.slots} of {experts.total} ({share:.0f} %, "
        f"{format_bytes(experts.budget_bytes)}); "
        + _traffic("decode", experts.decode, timings.decode_tokens)
    )
    return f"{first}\n{second}"


def _traffic(phase: str, traffic: ExpertTraffic, num_tokens: int) -> str:
    if not traffic.lookups or not num_tokens:
        return f"{phase}: no look-ups"
    hit, late, miss = (
        100 * count / traffic.lookups
        for count in (
            traffic.hits_resident + traffic.hits_prefetched,
            traffic.late_hits,
            traffic.misses,
        )
    )
    moved = (traffic.bytes_on_demand + traffic.bytes_prefetched) // num_tokens
    return (
        f"{phase}: {hit:.1f} % hits, {late:.1f} % late, {miss:.1f} % misses, "
        f"{format_bytes(moved)} read per token"
    )
