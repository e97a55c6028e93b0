"""`outrider bench report`: one self-contained HTML page from result files."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...collect.durable import durable_write
from ...runtime.errors import OutriderError, UsageError
from ..documents import read
from ..plot import require
from .figures import draw
from .tables import TITLES, notes, table

_TEMPLATE = "report.html.j2"
_RESOLUTION = 130


def result_files(results: Sequence[Path]) -> list[Path]:
    """The files named, and all JSON files of the folders named. UsageError where there are none."""
    found: list[Path] = []
    for path in results:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise UsageError(
                    f"{str(path)!r} holds no .json file; results are made with --json > FILE"
                )
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def write_report(results: Sequence[Path], out: Path) -> Path:
    """Write the page of all results to `out`; returns it. Blocks while drawing.

    UsageError for files that are not there, InvalidDataError for those that are no results,
    OutriderError where `out` cannot be written. Needs matplotlib and jinja2.
    """
    require()
    documents = [(path, *read(path)) for path in result_files(results)]
    sections = [_section(number, *one) for number, one in enumerate(documents, start=1)]
    environments = list(
        {
            (one["cpu"], one["commit"], one["date"][:10]): one
            for one in (document["environment"] for _, _, document in documents)
        }.values()
    )
    page = _render(sections, environments)
    try:
        with durable_write(out) as file:
            file.write(page.encode())
    except OSError as error:
        raise OutriderError(
            f"out: {str(out)!r} cannot be written: {error.strerror or error}"
        ) from error
    return out


def png(figure: Any) -> str:
    """The figure as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_RESOLUTION)
    return base64.b64encode(buffer.getvalue()).decode()


def _section(number: int, path: Path, kind: str, document: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"result-{number}",
        "title": TITLES[kind],
        "file": path.name,
        "is_simulated": kind in ("simulate", "fit"),
        "notes": notes(kind, document),
        "figures": [
            {"title": title, "data": png(figure)} for title, figure in draw(kind, document).items()
        ],
        "tables": table(kind, document),
    }


def _render(sections: list[dict[str, Any]], environments: list[dict[str, Any]]) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined

    style = files("outrider.collect.analysis") / "templates" / "style.css"
    template = files("outrider.bench.report") / "templates" / _TEMPLATE
    sources = {
        "style.css": style.read_text(encoding="utf-8"),
        _TEMPLATE: template.read_text(encoding="utf-8"),
    }
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(sections=sections, environments=environments)
