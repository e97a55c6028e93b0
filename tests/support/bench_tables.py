"""Writes the README's benchmark tables from result files: python tests/support/bench_tables.py DIR

Each table stands between `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->`; NAME.json in DIR
is what it is made of. A table whose result is not there is left as it is.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.bench.documents import read
from outrider.bench.report.tables import Table, markdown, percent, table

ROOT = Path(__file__).resolve().parents[2]
Document = Mapping[str, Any]


def origin(document: Document) -> str:
    """One line: when, where and from which code."""
    around = document["environment"]
    commit = (around["commit"] or "unknown")[:10]
    load = " to ".join(f"{one:.1f}" for one in around["load_average"])
    row = next(iter(document.get("rows", ())), {})
    card = f"{row['device_name']}; " if row.get("device", "").startswith("cuda") else ""
    return (
        f"{card}{around['cpu']}, {around['num_cpus']} processors, load {load}; "
        f"{around['date'][:10]}, "
        f"commit {commit}."
    )


def replayed(document: Document) -> str:
    """Hit rates by budget, warm: demand-only rows, then those that read ahead."""
    rows = [row for row in document["rows"] if row["cache"] == "warm"]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    arms: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        name = row["policy"], Path(row["predictor"]).name, row["prefetch"]
        arms.setdefault(name, {})[row["budget"]] = row
    lines = [
        [
            policy if predictor == "none" else f"{policy}, {predictor}",
            "no" if prefetch == "off" else "yes",
            *(percent(of[budget]["hit_rate"]) for budget in budgets),
            f"{of['25%']['bytes_per_token'] / 1e6:.2f}" if "25%" in of else "",
        ]
        for (policy, predictor, prefetch), of in arms.items()
    ]
    settings = document["settings"]
    headings = ["policy, predictor", "reads ahead", *budgets, "MB a token at 25%"]
    return (
        f"Hit rate in decode by share of the experts that fits, warm; {settings['tokens']:,} "
        f"tokens of {settings['documents']:,} documents ({settings['split']} split), "
        f"{settings['model_shape']}.\n\n"
        f"{markdown(Table('', headings, lines))}\n\n{origin(document)}"
    )


def fits(document: Document) -> str:
    """One row a device, the formats side by side."""
    rows = document["rows"]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = {row["format"]: row for row in rows if row["device"] == device}
        cells = [device, f"{own[formats[0]]['room_bytes'] / 1e9:.1f}"]
        for fmt in formats:
            row = own[fmt]
            cells.append(
                f"{100 * row['resident_share']:.0f} %, {row['on_demand_tokens_per_second']:.0f} to "
                f"{row['roofline_tokens_per_second']:.0f}"
                if row["runs"]
                else "does not run"
            )
        lines.append(cells)
    headings = ["device", "GB for experts", *(f"{fmt}: resident, tokens/s" for fmt in formats)]
    settings = document["settings"]
    return (
        f"**Simulated**, {settings['model_shape']}, batch 1, {settings['context_tokens']:,} tokens "
        "of KV cache; from on demand without any overlap to the bound, hit rate taken as the share "
        f"resident.\n\n{markdown(Table('', headings, lines))}"
    )


def thousands(count: float) -> str:
    """Without digits that nobody believes."""
    return f"{count / 1e3:,.0f}" if count >= 1e4 else f"{count / 1e3:.1f}"


def collecting(document: Document) -> str:
    """Traces an hour, one row a device, the formats side by side."""
    rows, first = document["rows"], document["rows"][0]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = {row["format"]: row for row in rows if row["device"] == device}
        lines.append([device])
        for fmt in formats:
            row = own[fmt]
            lines[-1].append(
                f"{thousands(row['traces_per_hour'])} to "
                f"{thousands(row['roofline_traces_per_hour'])}"
                if row["runs"]
                else "does not run"
            )
    headings = ["device", *(f"{fmt}: thousand traces an hour" for fmt in formats)]
    return (
        f"**Simulated**, {document['settings']['model_shape']}, passes of {first['batch_traces']} "
        f"traces of {first['trace_tokens']} tokens that touch every expert; from nothing "
        f"overlapped to the bound.\n\n{markdown(Table('', headings, lines))}"
    )


def simulated(document: Document) -> str:
    """All rows of one budget, warm."""
    warm = dict(document, rows=[row for row in document["rows"] if row["cache"] == "warm"])
    parts = [f"{one.caption}:\n\n{markdown(one)}" for one in table("simulate", warm)]
    settings = document["settings"]
    return (
        f"**Simulated** for {settings['model_shape']} in {settings['format']} on "
        f"{settings['device']['title']}, from {settings['tokens']:,} recorded tokens of "
        f"{settings['recorded_shape']}.\n\n" + "\n\n".join(parts)
    )


def validated(document: Document) -> str:
    """Measured beside simulated."""
    parts = [f"{one.caption}:\n\n{markdown(one)}" for one in table("validate", document)]
    unseen = [row for row in document["rows"] if not row["is_calibration"]]
    within = sum(abs(row["error"]) <= 0.15 for row in unseen)
    return (
        f"{within} of {len(unseen)} unseen configurations within 15 %; median error "
        f"{document['median_error']:.1%}, worst {document['worst_error']:.1%}.\n\n"
        + "\n\n".join(parts)
        + f"\n\n{origin(document)}"
    )


def read_ahead(document: Document) -> str:
    """Arms of `bench decode` at each budget, held against the one that reads nothing ahead."""
    parts = []
    for cache in dict.fromkeys(row["cache"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["cache"] == cache]
        demand = {row["budget"]: row for row in rows if row["arm"] == "on-demand"}
        lines = [_read_ahead_line(row, demand.get(row["budget"])) for row in rows]
        parts.append(f"{cache} caches:\n\n{markdown(Table('', READ_AHEAD, lines))}")
    first = document["rows"][0]
    link = first["link_bytes_per_s"] / 1e9
    limits = [row["link_limit_bytes_per_s"] for row in document["rows"]]
    limit = next(filter(None, limits), None)
    throttled = f", throttled to {limit / 1e6:.0f} MB/s" if limit else ""
    return (
        "\n\n".join(parts)
        + f"\n\nPlain read {first['read_bytes_per_s'] / 1e9:.0f} GB/s, link {link:.2f} GB/s"
        f"{throttled}, {first['active_bytes_per_token'] / 1e6:.0f} MB active a token, "
        f"{first['expert_bytes'] / 1e6:.1f} MB an expert, {first['threads']} threads. "
        + origin(document)
    )


READ_AHEAD = [
    "arm", "experts", "tokens/s", "paired ratio to on-demand", "stall, ms", "stall hidden", "late",
    "MB a token", "to on-demand", "MB wasted", "share of roofline",
]  # fmt: skip


def _read_ahead_line(row: dict[str, Any], demand: dict[str, Any] | None) -> list[str]:
    arm, _, predictor = row["arm"].partition(":")
    name = Path(predictor or row["predictor"]).name
    ratio, spread = row["ratio"], row["spread"]
    is_held = demand is not None and demand is not row
    hidden = 1 - row["stall_s_per_token"] / demand["stall_s_per_token"] if is_held else None
    more = row["bytes_per_token"] / demand["bytes_per_token"] if is_held else None
    return [
        f"{arm}, {name}" if arm == "prefetch" else arm,
        row["budget"],
        f"{row['tokens_per_second']:.1f} ({spread['low']:.1f}-{spread['high']:.1f})",
        f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if is_held else "",
        f"{1000 * row['stall_s_per_token']:.1f}",
        "" if hidden is None else f"{100 * hidden:.0f} %",
        percent(row["late_rate"]),
        f"{row['bytes_per_token'] / 1e6:.1f}",
        "" if more is None else f"{more:.2f}",
        f"{row['wasted_bytes_per_token'] / 1e6:.1f}",
        f"{100 * row['roofline_share']:.0f} %",
    ]


OTHERS = [
    "arm", "experts", "weights", "memory limit, GB", "tokens/s", "outrider is faster, paired",
    "MB from disk a token", "same tokens", "share of roofline",
]  # fmt: skip


def beside_others(document: Document) -> str:
    """Other systems' rows beside ours: in one limit of memory, then with everything resident."""
    parts = []
    limited = [row for row in document["rows"] if row["budget"] != "all"]
    resident = [row for row in document["rows"] if row["budget"] == "all"]
    for caption, rows in (("within a limit", limited), ("all resident, no limit", resident)):
        if rows:
            lines = [_beside_others_line(row) for row in rows]
            parts.append(f"{caption}:\n\n{markdown(Table('', OTHERS, lines))}")
    reads = [row["read_bytes_per_s"] / 1e9 for row in document["rows"]]
    links = [row["link_bytes_per_s"] / 1e9 for row in limited]
    first = document["rows"][0]
    counts = " or ".join(map(str, sorted({row["repetitions"] for row in document["rows"]})))
    link = f"link {min(links):.2f} to {max(links):.2f} GB/s, " if links else ""
    return (
        "\n\n".join(parts) + f"\n\nPlain read {min(reads):.0f} to {max(reads):.0f} GB/s, {link}"
        f"{first['threads']} threads, medians of {counts}. " + origin(document)
    )


def _beside_others_line(row: dict[str, Any]) -> list[str]:
    limit, ratio, spread = row["memory_limit_bytes"], row["ratio"], row["spread"]
    is_other = row["arm"].startswith(("accelerate", "llama.cpp"))
    digits = 1 if spread["high"] >= 10 else 2
    faster = (
        f"{1 / ratio['median']:.2f} ({1 / ratio['high']:.2f}-{1 / ratio['low']:.2f})"
        if is_other
        else ""
    )
    return [
        row["arm"],
        row["budget"],
        row["format"],
        "" if limit is None else f"{limit / 1e9:.2f}",
        f"{row['tokens_per_second']:.{digits}f} "
        f"({spread['low']:.{digits}f}-{spread['high']:.{digits}f})",
        faster,
        f"{row['storage_bytes_per_token'] / 1e6:.0f}",
        f"{100 * row['token_agreement']:.0f} %",
        f"{100 * row['roofline_share']:.0f} %",
    ]


def plainly(kind: str) -> Callable[[Document], str]:
    """The tables as the report has them."""

    def write(document: Document) -> str:
        parts = [f"{one.caption}:\n\n{markdown(one)}" for one in table(kind, document)]
        return "\n\n".join([*parts, origin(document)])

    return write


# A table is made of the result of its own name, but for these.
RESULT_OF = {"collecting": "fit"}
WRITERS: dict[str, Callable[[Document], str]] = {
    "collecting": collecting,
    "hit-rate": replayed,
    "fit": fits,
    "simulate": simulated,
    "validate": validated,
    "transfer": plainly("transfer"),
    "decode": plainly("decode"),
    "prefetch": read_ahead,
    "prefetch-throttled": read_ahead,
    "prefetch-gpu": read_ahead,
    "others": beside_others,
    "kernels": plainly("kernels"),
}


# Results under names of their own, of a kind that has another one.
KINDS = {
    "prefetch": "decode",
    "prefetch-throttled": "decode",
    "prefetch-gpu": "decode",
    "others": "decode",
}


def rewritten(text: str, folder: Path) -> tuple[str, list[str]]:
    """`text` with every marked table made anew whose result is in `folder`, and their names."""
    done = []
    for name, write in WRITERS.items():
        begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
        of = RESULT_OF.get(name, name)
        file = folder / f"{of}.json"
        if begin not in text or end not in text or not file.is_file():
            continue
        kind, document = read(file)
        wanted = KINDS.get(of, of)
        if kind != wanted:
            raise SystemExit(f"{file}: a {kind} document, not {wanted}")
        start, stop = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:start]}\n{write(document)}\n{text[stop:]}"
        done.append(name)
    return text, done


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder = Path(arguments[0])
    for name in ("README.md", "docs/benchmarks.md", "docs/gpu.md", "docs/scale-out/README.md"):
        page = ROOT / name
        if page.is_file():
            text, done = rewritten(page.read_text(), folder)
            page.write_text(text)
            sys.stdout.write(f"{name}: {', '.join(done) or 'nothing'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
