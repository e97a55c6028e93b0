"""Writes an analysis for people: figures, contexts as text, and one HTML page that needs nothing
else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from ..durable import durable_write
from .comparison import COMPARISON_NAME, Comparison, ModelRow, compare, write_comparison
from .document import ANALYSIS_NAME, Analysis, write_analysis
from .figures import clearest_layer, compared, draw

PAGE_NAME = "index.html"
_RESOLUTION = 130
_TEMPLATES = "outrider.collect.analysis"


def write_report(analysis: Analysis, out: Path) -> list[Path]:
    """Write document, PNG figures, `expert_contexts.txt` and `index.html` into `out`; -> what was
    written.

    Blocks while drawing. Needs matplotlib and jinja2. OSError where `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_analysis(analysis, out / ANALYSIS_NAME)
    written = [out / ANALYSIS_NAME]
    pictures = {name: _png(figure) for name, figure in draw(analysis).items()}
    for name, data in pictures.items():
        path = out / "figures" / f"{name}.png"
        _write(path, data)
        written.append(path)
    _write(out / "expert_contexts.txt", _contexts(analysis).encode())
    clearest = clearest_layer(analysis)
    page = _render(
        "analysis.html.j2",
        analysis=analysis,
        figures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        clearest=clearest,
        experts=msgspec.to_builtins(analysis.experts),
    )
    _write(out / PAGE_NAME, page.encode())
    return [*written, out / "expert_contexts.txt", out / PAGE_NAME]


def write_comparison_report(
    analyses: Mapping[str, Analysis], out: Path
) -> tuple[Comparison, list[Path]]:
    """Write `comparison.json`, its figure and `index.html` into `out`; blocks while drawing."""
    out.mkdir(parents=True, exist_ok=True)
    comparison = compare(analyses)
    write_comparison(comparison, out / COMPARISON_NAME)
    picture = _png(compared(analyses))
    _write(out / "figures" / "comparison.png", picture)
    page = _render(
        "comparison.html.j2",
        rows=comparison.rows,
        lines=_comparison_lines(comparison.rows),
        figure=base64.b64encode(picture).decode(),
    )
    _write(out / PAGE_NAME, page.encode())
    names = (COMPARISON_NAME, "figures/comparison.png", PAGE_NAME)
    return comparison, [out / name for name in names]


def _comparison_lines(rows: list[ModelRow]) -> list[tuple[str, str, list[str]]]:
    """Title, unit and the printed value of each model."""

    def printed(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        (
            "MoE layers x experts, top-k",
            "",
            [f"{r.num_moe_layers} x {r.num_experts}, top-{r.top_k}" for r in rows],
        )
    ]
    for title, unit, name, form in _COMPARED:
        lines.append((title, unit, [printed(getattr(row, name), form) for row in rows]))
    for budget in ("10%", "25%", "50%"):
        rates = [format(row.lru_hit_rate[budget], ".1%") for row in rows]
        lines.append((f"LRU hit rate, {budget} of the experts cached", "", rates))
    return lines


def _contexts(analysis: Analysis) -> str:
    lines = []
    for expert in analysis.experts:
        tokens = ", ".join(repr(use.text) for use in expert.top_tokens)
        lines.append(
            f"layer {expert.layer_idx} expert {expert.expert_idx}: {expert.share:.2%} of tokens; "
            f"tokens {tokens or '-'}"
        )
        for place in expert.contexts:
            text = f"{place.before}[[{place.token}]]{place.after}".replace("\n", "\\n")
            lines.append(f"  {place.weight:.4f} {place.dataset}: {text}")
    return "\n".join(lines) + "\n"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_RESOLUTION)
    return buffer.getvalue()


def _render(template: str, **values: Any) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files(_TEMPLATES) / "templates"
    sources = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("style.css", template)
    }
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    environment.filters["bits"] = lambda value: "-" if value is None else f"{value:.2f}"
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.get_template(template).render(**values)


def _write(path: Path, data: bytes) -> None:
    with durable_write(path) as file:
        file.write(data)


_COMPARED = (
    ("share of experts active a token", "k / E", "active_share", ".1%"),
    ("coverage", "experts used / E", "coverage", ".1%"),
    ("routing entropy", "bits", "routing_entropy", ".2f"),
    ("routing entropy, normalised", "of log2 E", "normalized_entropy", ".1%"),
    ("effective experts", "2^entropy", "effective_experts", ".1f"),
    ("effective experts, normalised", "of E", "effective_share", ".1%"),
    ("router entropy of one token", "bits", "router_entropy", ".2f"),
    ("concentration", "max / mean", "concentration", ".2f"),
    ("concentration, normalised", "0 balanced, 1 most unequal", "normalized_concentration", ".3f"),
    ("Gini", "0 balanced", "gini", ".3f"),
    ("unique top-2 pairs", "", "unique_pairs", ",d"),
    ("unique top-2 pairs, normalised", "of all possible", "pair_share", ".1%"),
    ("told by the data set", "bits", "dataset_information", ".3f"),
    ("told by the data set, normalised", "of the entropy", "dataset_share", ".1%"),
    ("told by the token id", "bits", "token_information", ".2f"),
    ("told by the token id, normalised", "of the entropy", "token_share", ".1%"),
    ("told by the layer before", "bits", "next_layer_information", ".2f"),
    ("recall at k by chance", "k / E", "chance_recall", ".1%"),
    ("recall at k, always the most used", "", "frequency_recall", ".1%"),
    ("... skill over chance", "", "frequency_skill", ".1%"),
    ("recall at k, previous token's experts", "", "previous_recall", ".1%"),
    ("... skill over chance", "", "previous_skill", ".1%"),
)
