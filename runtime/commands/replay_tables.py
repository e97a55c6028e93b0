"""Tables of what was replayed or simulated, 80 columns wide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


def print_hit_rates(document: dict[str, Any]) -> None:
    """A table a budget, warm rows only."""
    settings = document["settings"]
    rows = [row for row in document["rows"] if row["cache"] == "warm"]
    _print_by_budget(rows, _COLUMNS, _cells)
    first = rows[0]
    typer.echo(
        f"{settings['tokens']} tokens of {settings['documents']} documents, warm; "
        f"{settings['model_shape']}, {settings['format']}. Hits, bytes: counted. Stall and tokens "
        f"per second: SIMULATED for {first['device']}. Without a mark a row reads nothing ahead; + "
        "marks prefetching."
    )
    _warn_of_few(first)


def print_simulation(document: dict[str, Any]) -> None:
    """What fits, then a table a budget, warm; says in each that it is simulated."""
    settings, fit = document["settings"], document["fit"]
    rows = [row for row in document["rows"] if row["cache"] == "warm"]
    typer.echo(
        f"SIMULATED: {settings['model_shape']}, experts in {settings['format']}, on "
        f"{settings['device']['title']}: {_fit_text(fit)}"
    )
    if settings["mapping"] is not None:
        typer.echo(f"Routing of {settings['recorded_shape']}: {settings['mapping']}.")
    _print_by_budget(rows, _SIMULATED_COLUMNS, _simulated_cells, mark="SIMULATED, ")
    first = rows[0]
    typer.echo(
        f"{settings['tokens']} tokens of {settings['documents']} documents, warm, batch 1. Bound: "
        "1 / max(weights of a token / memory read, bytes the best LRU misses / link); + marks "
        "prefetching. No figure here was measured on such a device."
    )
    _warn_of_few(first)


def print_fit(document: dict[str, Any]) -> None:
    """One row a device and format."""
    settings = document["settings"]
    table = Table(title=f"SIMULATED: {settings['model_shape']}", title_justify="left", box=None,
                  padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("device", overflow="fold")
    table.add_column("format", no_wrap=True)
    for heading in ("GB for\nexperts", "experts\nresident", "on demand\ntokens/s",
                    "bound\ntokens/s", "all in memory\ntokens/s",
                    "collecting\ntraces/hour"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in document["rows"]:
        shown = "" if row["device"] == previous else row["device"]
        previous = row["device"]
        if not row["runs"]:
            cells = (f"{row['room_bytes'] / 1e9:.1f}", "does not run", "", "", "", "")
        else:
            cells = (
                f"{row['room_bytes'] / 1e9:.1f}",
                f"{100 * row['resident_share']:.0f}%",
                f"{row['on_demand_tokens_per_second']:.1f}",
                f"{row['roofline_tokens_per_second']:.1f}",
                f"{row['resident_roofline_tokens_per_second']:.1f}",
                f"{row['traces_per_hour']:,.0f}",
            )
        table.add_row(shown, row["format"], *cells)
    Console(highlight=False).print(table)
    first = document["rows"][0]
    typer.echo(
        f"From {settings['source']}; all experts {first['experts_bytes'] / 1e9:.1f} GB in "
        f"{first['format']}, the rest in bf16, {settings['context_tokens']} tokens of KV cache, "
        "batch 1. Hit rate taken as the share resident: real routing has locality and does "
        "better. On demand: with the profile's overheads, nothing overlapped. Bound: reads and "
        "arithmetic overlapped, no overheads. "
        f"Collecting: passes of {first['batch_traces']} traces of {first['trace_tokens']} tokens "
        "through every expert, nothing overlapped. Nothing here was measured on these devices."
    )


def print_validation(document: dict[str, Any]) -> None:
    """Measured beside simulated, the unseen after those calibrated on."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("configuration", overflow="fold")
    for heading in ("measured\ntokens/s", "interval", "simulated\ntokens/s", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        spread = row["spread"]
        table.add_row(
            row["name"] + (" (calibrated on)" if row["is_calibration"] else ""),
            f"{row['measured_tokens_per_second']:.1f}",
            f"{spread['low']:.1f}-{spread['high']:.1f}",
            f"{row['simulated_tokens_per_second']:.1f}",
            f"{100 * row['error']:+.1f}%",
        )
    Console(highlight=False).print(table)
    unseen = [row for row in document["rows"] if not row["is_calibration"]]
    within = sum(abs(row["error"]) <= 0.15 for row in unseen)
    load = document["environment"]["load_average"]
    typer.echo(
        f"{within} of {len(unseen)} unseen configurations within 15 %; median error "
        f"{100 * document['median_error']:.1f} %, worst {100 * document['worst_error']:.1f} %. "
        f"Load average {load[0]:.1f} to {load[-1]:.1f} on "
        f"{document['environment']['num_cpus']} processors."
    )


def _fit_text(fit: dict[str, Any]) -> str:
    return (
        f"{fit['room_bytes'] / 1e9:.1f} GB for experts of {fit['experts_bytes'] / 1e9:.1f} GB, "
        f"{100 * fit['resident_share']:.0f} % of them resident; all in memory "
        f"{fit['resident_roofline_tokens_per_second']:.0f} tokens/s at most."
    )


def _print_by_budget(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], cells: Any, *, mark: str = ""
) -> None:
    console = Console(highlight=False)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        table = Table(title=f"{mark}{budget} of the experts", title_justify="left", box=None,
                      padding=(0, 1, 0, 0))  # fmt: skip
        for heading in ("policy", "predictor"):
            table.add_column(heading, no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            if row["budget"] == budget:
                table.add_row(*cells(row))
        console.print(table)


def _warn_of_few(row: dict[str, Any]) -> None:
    if not row["is_stable"]:
        typer.echo(f"Only {row['tokens']} tokens are counted: rates of other text will differ.")


# Two lines each, so that the table fits 80 columns.
_COLUMNS = ("hits", "late", "miss", "recall\nmisses", "preci-\nsion", "MB\nread", "MB\nwasted",
            "stall\nms", "tokens\n/s")  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    predictor = Path(row["predictor"]).name
    return [
        row["policy"],
        "" if predictor == "none" else predictor + ("" if row["prefetch"] == "off" else " +"),
        percent(row["hit_rate"]),
        percent(row["late_rate"]),
        percent(row["miss_rate"]),
        percent(row.get("recall_on_misses")),
        percent(row["precision"]),
        f"{row['bytes_per_token'] / 1e6:.2f}",
        f"{row['wasted_bytes_per_token'] / 1e6:.2f}",
        f"{1000 * row['stall_s_per_token']:.2f}",
        f"{row['tokens_per_second']:.1f}",
    ]


_SIMULATED_COLUMNS = ("hits", "late", "MB\nread", "MB\nwasted", "stall\nms", "simulated\ntokens/s",
                      "bound\ntokens/s", "share of\nbound")  # fmt: skip


def _simulated_cells(row: dict[str, Any]) -> list[str]:
    policy, predictor, hits, late, *_ = _cells(row)
    return [
        policy,
        predictor,
        hits,
        late,
        f"{row['bytes_per_token'] / 1e6:.0f}",
        f"{row['wasted_bytes_per_token'] / 1e6:.0f}",
        f"{1000 * row['stall_s_per_token']:.1f}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['roofline_tokens_per_second']:.1f}",
        f"{100 * row['roofline_share']:.0f}%",
    ]
