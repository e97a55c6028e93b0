"""Puts results of `bench decode` into docs: python tests/support/publish.py RESULTS NAME [PART ...]

The rows of each PART.json in RESULTS (NAME.json if none is named) go into docs/NAME.json, this
machine's paths replaced by their last names, and are drawn into docs/NAME.png.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.bench.documents import read
from outrider.bench.plot import plot_decode

DOCS = Path(__file__).resolve().parents[2] / "docs"


def named(arm: str) -> str:
    """An arm with its predictor's folder by name alone."""
    kind, colon, rest = arm.partition(":")
    predictor, comma, budget = rest.partition(", ")
    return f"{kind}{colon}{Path(predictor).name}{comma}{budget}" if colon else arm


def published(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document of all rows, without paths: surroundings are the first one's, load is all's."""
    first = documents[0]
    loads = [load for one in documents for load in one["environment"]["load_average"]]
    rows = [dict(row) for one in documents for row in one["rows"]]
    for row in rows:
        row["arm"] = named(row["arm"])
        row["model"] = Path(row["model"]).name
        row["predictor"] = Path(row["predictor"]).name
        row["workload"] = _workload(row["workload"])
    return {
        "environment": {**first["environment"], "load_average": [min(loads), max(loads)]},
        "workload": _workload(first["workload"]),
        "rows": rows,
        "timelines": [
            {**line, "arm": named(line["arm"])}
            for one in documents
            for line in one.get("timelines", [])
        ],
    }


def _workload(workload: Mapping[str, Any]) -> dict[str, Any]:
    return {**workload, "prompts": Path(workload["prompts"]).name}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder, name, *parts = arguments
    documents = []
    for part in parts or [name]:
        kind, document = read(Path(folder) / f"{part}.json")
        if kind != "decode":
            raise SystemExit(f"{part}.json: a {kind} document, not decode")
        documents.append(document)
    document = published(documents)
    (DOCS / f"{name}.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")
    plot_decode(document, DOCS / f"{name}.png")
    sys.stdout.write(f"docs/{name}.json, docs/{name}.png: {len(document['rows'])} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
