"""Writes an evaluation for people: the document, figures, and one HTML page that needs nothing
else.
"""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...collect.durable import durable_write
from ...runtime.errors import OutriderError
from .figures import draw, label, png

DOCUMENT_NAME = "evaluation.json"
PAGE_NAME = "index.html"

FIRST_WRITE_UP = (
    ("random", "1.56 %"),
    ("frequent", "8-12 %"),
    ("cluster", "20-25 %"),
    ("pattern", "25-35 %"),
    ("statistics", "30-40 %"),
)
"""What the idea's first write-up stated for 64 experts, without saying which metric."""

_TEMPLATE = "prediction.html.j2"


def write_page(document: dict[str, Any], out: Path) -> list[Path]:
    """Write `evaluation.json`, figures and `index.html` into `out`; -> what was written.

    Blocks while drawing. Needs matplotlib and jinja2. OutriderError where `out` cannot be written.
    """
    pictures = {name: png(figure) for name, figure in draw(document).items()}
    page = _render(document, pictures)
    contents = {DOCUMENT_NAME: json.dumps(document, indent=1).encode()}
    contents |= {f"figures/{name}.png": data for name, data in pictures.items()}
    contents[PAGE_NAME] = page.encode()
    try:
        for name, data in contents.items():
            with durable_write(out / name) as file:
                file.write(data)
    except OSError as error:
        raise OutriderError(
            f"out: {str(out)!r} cannot be written: {error.strerror or error}"
        ) from error
    return [out / name for name in contents]


def _render(document: dict[str, Any], pictures: dict[str, bytes]) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined

    style = files("outrider.collect.analysis") / "templates" / "style.css"
    template = files("outrider.bench.prediction") / "templates" / _TEMPLATE
    sources = {
        "style.css": style.read_text(encoding="utf-8"),
        _TEMPLATE: template.read_text(encoding="utf-8"),
    }
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1%}"
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["skill"] = lambda value: "-" if value is None else f"{value:.2f}"
    environment.filters["interval"] = lambda pair: (
        "" if pair is None else f"{pair[0]:.1%} to {pair[1]:.1%}"
    )
    rows = document["rows"]
    return environment.get_template(_TEMPLATE).render(
        document=document,
        rows=[row | {"label": label(row)} for row in rows],
        figures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        stated=dict(FIRST_WRITE_UP),
        layers=range(document["shape"]["num_moe_layers"]),
        by_layer=[
            (label(row), {layer["layer_idx"]: layer for layer in row["per_layer"]}) for row in rows
        ],
    )
