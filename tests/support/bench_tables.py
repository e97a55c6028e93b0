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
    return (
        f"{around['cpu']}, {around['num_cpus']} processors, load {load}; {around['date'][:10]}, "
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


def plainly(kind: str) -> Callable[[Document], str]:
    """The tables as the report has them."""

    def write(document: Document) -> str:
        parts = [f"{one.caption}:\n\n{markdown(one)}" for one in table(kind, document)]
        return "\n\n".join([*parts, origin(document)])

    return write


WRITERS: dict[str, Callable[[Document], str]] = {
    "hit-rate": replayed,
    "fit": fits,
    "simulate": simulated,
    "validate": validated,
    "transfer": plainly("transfer"),
    "decode": plainly("decode"),
    "kernels": plainly("kernels"),
}


def rewritten(text: str, folder: Path) -> tuple[str, list[str]]:
    """`text` with every marked table made anew whose result is in `folder`, and their names."""
    done = []
    for name, write in WRITERS.items():
        begin, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
        file = folder / f"{name}.json"
        if begin not in text or end not in text or not file.is_file():
            continue
        kind, document = read(file)
        if kind != name:
            raise SystemExit(f"{file}: a {kind} document, not {name}")
        start, stop = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:start]}\n{write(document)}\n{text[stop:]}"
        done.append(name)
    return text, done


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder = Path(arguments[0])
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        if page.is_file():
            text, done = rewritten(page.read_text(), folder)
            page.write_text(text)
            sys.stdout.write(f"{page.name}: {', '.join(done) or 'nothing'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
