"""Result documents as tables of text: which columns a kind shows, and how a figure is written.

Shared by the HTML report and the README's tables.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TITLES = {
    "hit-rate": "Hit rates by replay",
    "simulate": "Simulated speed on a device",
    "fit": "What fits, and the bounds",
    "decode": "Decoding, measured",
    "transfer": "Transfer, measured",
    "kernels": "Expert kernels, measured",
    "serve": "Serving, measured",
    "validate": "The simulator against the machine",
    "evaluate": "Predictors",
}

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, headings, and rows of text; the first column is text, the others figures."""

    caption: str
    headings: list[str]
    rows: list[list[str]]


def table(kind: str, document: Mapping[str, Any]) -> list[Table]:
    """The tables of a document, in the order of its rows."""
    columns, group = _KINDS[kind]
    groups: dict[str, list[Row]] = {}
    for row in document["rows"]:
        groups.setdefault(group(row), []).append(row)
    return [
        Table(caption, list(columns), [[cell(row) for cell in columns.values()] for row in rows])
        for caption, rows in groups.items()
    ]


def markdown(one: Table) -> str:
    """A table as Markdown."""
    lines = [f"| {' | '.join(one.headings)} |", f"|{'---|' * len(one.headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in one.rows)])


def notes(kind: str, document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    settings = document.get("settings", {})
    if kind in ("hit-rate", "simulate"):
        found.append(
            f"{settings['tokens']:,} tokens in {settings['sequences']:,} sequences of "
            f"{settings['documents']:,} documents, split {settings['split']}; "
            f"{settings['model_shape']}, experts in {settings['format']}. Hits and bytes are "
            f"counted; stall and tokens/s are simulated for {settings['device']['title']}."
        )
        first = document["rows"][0]
        if not first["is_stable"]:
            found.append("Few tokens: rates of other text will differ by more than policies do.")
    if settings.get("mapping"):
        found.append(f"Recorded routing of {settings['recorded_shape']}: {settings['mapping']}.")
    if kind == "fit":
        found.append(
            f"From {settings['source']}; {settings['context_tokens']:,} tokens of KV cache; hit "
            f"rate: {settings['hit_rate']}."
        )
    if kind == "validate":
        found.append(
            f"Unseen configurations: median error {document['median_error']:.1%}, worst "
            f"{document['worst_error']:.1%}."
        )
    load = document["environment"]["load_average"]
    if kind in ("decode", "transfer", "kernels", "serve", "validate"):
        found.append(
            f"Load average {' to '.join(f'{one:.1f}' for one in load)} on "
            f"{document['environment']['num_cpus']} processors: above that number, figures are a "
            "busy machine's."
        )
    return found


def percent(value: float | None) -> str:
    """One decimal of a percentage, "" for none."""
    return "" if value is None or value != value else f"{100 * value:.1f} %"


def _number(name: str, places: int = 1, factor: float = 1.0) -> Cell:
    def cell(row: Row) -> str:
        value = row.get(name)
        return "" if value is None or value != value else f"{factor * value:.{places}f}"

    return cell


def _percent(name: str) -> Cell:
    return lambda row: percent(row.get(name))


def _text(name: str) -> Cell:
    return lambda row: str(row.get(name) if row.get(name) is not None else "")


def _policy(row: Row) -> str:
    predictor = Path(row["predictor"]).name
    if predictor == "none":
        return row["policy"]
    return f"{row['policy']} {'+' if row['prefetch'] != 'off' else 'by'} {predictor}"


def _speed(row: Row) -> str:
    spread = row["spread"]
    return f"{row['tokens_per_second']:.1f} ({spread['low']:.1f}-{spread['high']:.1f})"


def _measured(row: Row) -> str:
    spread = row["spread"]
    speed = row["measured_tokens_per_second"]
    return f"{speed:.1f} ({spread['low']:.1f}-{spread['high']:.1f})"


def _spread(row: Row) -> str:
    spread = row["spread"]
    return f"{row['gb_per_s']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def _bytes(name: str) -> Cell:
    def cell(row: Row) -> str:
        size = row[name]
        return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"

    return cell


def _error(row: Row) -> str:
    return f"{100 * row['error']:+.1f} %"


def _runs(name: str, places: int = 1) -> Cell:
    return lambda row: _number(name, places)(row) if row["runs"] else "does not run"


_REPLAYED: dict[str, Cell] = {
    "policy": _policy,
    "hits": _percent("hit_rate"),
    "late": _percent("late_rate"),
    "misses": _percent("miss_rate"),
    "recall on misses": _percent("recall_on_misses"),
    "precision": _percent("precision"),
    "MB a token": _number("bytes_per_token", 2, 1e-6),
    "MB wasted": _number("wasted_bytes_per_token", 2, 1e-6),
    "stall, ms": _number("stall_s_per_token", 2, 1e3),
    "tokens/s, simulated": _number("tokens_per_second"),
}


def _budget(row: Row) -> str:
    return f"{row['budget']} of the experts, {row['cache']}, link {row['link_bytes_per_s'] / 1e9:g} GB/s"  # noqa: E501


_KINDS: dict[str, tuple[dict[str, Cell], Callable[[Row], str]]] = {
    "hit-rate": (_REPLAYED, _budget),
    "simulate": (
        _REPLAYED
        | {
            "bound, tokens/s": _number("roofline_tokens_per_second"),
            "share of bound": _percent("roofline_share"),
        },
        lambda row: f"SIMULATED, {_budget(row)}",
    ),
    "fit": (
        {
            "format": _text("format"),
            "GB for experts": _number("room_bytes", 1, 1e-9),
            "all experts, GB": _number("experts_bytes", 1, 1e-9),
            "resident": _percent("resident_share"),
            "on demand, tokens/s": _runs("on_demand_tokens_per_second"),
            "bound, tokens/s": _number("roofline_tokens_per_second"),
            "all in memory, tokens/s": _number("resident_roofline_tokens_per_second"),
            "collecting, traces an hour": _runs("traces_per_hour"),
        },
        lambda row: f"SIMULATED, {row['device']}",
    ),
    "decode": (
        {
            "arm": _text("arm"),
            "experts": _text("budget"),
            "format": _text("format"),
            "tokens/s": _speed,
            "hits": _percent("hit_rate"),
            "late": _percent("late_rate"),
            "MB a token": _number("bytes_per_token", 2, 1e-6),
            "stall, ms": _number("stall_s_per_token", 1, 1e3),
            "outside of products": _percent("outside_products_share"),
            "TTFT, ms": _number("ttft_s", 0, 1e3),
            "roofline": _number("roofline_tokens_per_second"),
            "share of roofline": _percent("roofline_share"),
        },
        lambda row: f"{row['cache']} caches",
    ),
    "transfer": (
        {
            "block": _bytes("block_bytes"),
            "at a time": _text("depth"),
            "GB/s": _spread,
            "us a block": _number("microseconds_per_block"),
        },
        lambda row: (
            row["medium"]
            + {True: ", direct reads", False: ", buffered reads"}.get(row["is_direct"], "")
        ),
    ),
    "kernels": (
        {
            "operation": _text("op"),
            "implementation": _text("impl"),
            "format": _text("format"),
            "shape": _text("shape"),
            "GB/s": _number("gb_per_s"),
            "of a plain read": _percent("share_of_read"),
            "error": lambda row: f"{row['error']:.1e}",
        },
        lambda row: row["phase"],
    ),
    "serve": (
        {
            "clients": _text("max_concurrency"),
            "tokens/s": _number("output_throughput"),
            "requests/s": _number("request_throughput", 2),
            "TTFT, ms": _number("median_ttft_ms"),
            "TTFT p99": _number("p99_ttft_ms"),
            "TPOT, ms": _number("median_tpot_ms"),
            "ITL p99": _number("p99_itl_ms"),
            "failed": _text("failed"),
        },
        lambda row: "closed loop",
    ),
    "validate": (
        {
            "configuration": _text("name"),
            "measured, tokens/s": _measured,
            "simulated, tokens/s": _number("simulated_tokens_per_second"),
            "error": _error,
        },
        lambda row: "calibrated on" if row["is_calibration"] else "unseen",
    ),
    "evaluate": (
        {
            "forecast": lambda row: f"{row['predictor']}, {row['moment']} {row['distance']}",
            "top-1": _percent("top1"),
            "top-2": _percent("top2"),
            "recall@k": _percent("recall_at_k"),
            "recall@2k": _percent("recall_at_2k"),
            "exact": _percent("exact"),
            "precision": _percent("precision"),
        },
        lambda row: "held-out text",
    ),
}


def rows_where(document: Mapping[str, Any], **fields: Any) -> Iterable[Row]:
    """Rows whose fields have these values."""
    return (
        row
        for row in document["rows"]
        if all(row.get(name) == value for name, value in fields.items())
    )
