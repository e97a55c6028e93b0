"""Figures of an evaluation, drawn from the document alone. Needs the extra `plots`; opens no
window.
"""

import io
from pathlib import Path
from typing import Any

from ...runtime.errors import OutriderError
from ..plot import require

__all__ = ["draw", "plot", "png", "require"]

_PALETTE = (
    "#2f6690", "#d9713c", "#3f8f63", "#8057a6", "#b8860b", "#b0413e", "#2a9d9d", "#8a8f98",
)  # fmt: skip
_WHEN = {"before": "before, +{} token", "in_pass": "in pass, l+{}", "pre_attention": "pre-att., {}"}
_STYLE = {"fontsize": 10, "color": "#333"}
_RESOLUTION = 130


def label(row: dict[str, Any]) -> str:
    """A row's forecast in words: who, when, how far."""
    return f"{row['predictor']}, {_WHEN[row['moment']].format(row['distance'])}"


def draw(document: dict[str, Any]) -> dict[str, Any]:
    """Every figure by its file name without ending, in the order of the page."""
    return {
        "recall": _bars(document),
        "distance": _distance(document),
        "layers": _layers(document),
        "reliability": _reliability(document),
    }


def plot(document: dict[str, Any], path: Path) -> None:
    """Recall with intervals above, calibration below, into one PNG. OutriderError if unwritable."""
    require()
    rows = document["rows"]
    figure = _figure(10, 1.4 + 0.26 * len(rows) + 4.6)
    above, below = figure.subfigures(2, 1, height_ratios=(1.0 + 0.26 * len(rows), 4.6))
    _draw_bars(above.add_subplot(), rows)
    _draw_reliability(below, document)
    try:
        figure.savefig(path, dpi=_RESOLUTION, format="png")
    except OSError as error:
        raise OutriderError(f"plot: {path} cannot be written: {error}") from error


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_RESOLUTION)
    return buffer.getvalue()


def _bars(document: dict[str, Any]) -> Any:
    rows = document["rows"]
    figure = _figure(10, 1.0 + 0.26 * len(rows))
    _draw_bars(figure.add_subplot(), rows)
    return figure


def _draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    colours = _colours(rows)
    places = list(range(len(rows)))[::-1]
    for place, row in zip(places, rows, strict=True):
        value, interval = row["recall_at_k"], row["ci"]["recall_at_k"]
        spread = [[value - interval[0]], [interval[1] - value]] if interval else None
        axes.barh(
            place,
            value,
            xerr=spread,
            capsize=2,
            height=0.72,
            color=colours[row["predictor"]],
            alpha=1.0 if row["distance"] <= 1 else 0.6,
        )
        axes.plot([row["recall_at_2k"]] * 2, [place - 0.36, place + 0.36], color="#333", lw=1)
        # Names stand in the bar's own line, clear of intervals and marks.
        right = max(value if interval is None else interval[1], row["recall_at_2k"])
        axes.text(right + 0.01, place, f"{value:.1%}", va="center", fontsize=8.5)
    axes.set_yticks(places, [label(row) for row in rows], fontsize=8.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.12)
    _label(axes, "recall@k (bar, 95 % interval), recall@2k (line)", "")


def _distance(document: dict[str, Any]) -> Any:
    """Recall and recall on misses over the layers of distance."""
    rows = [row for row in document["rows"] if row["moment"] == "in_pass"]
    figure = _figure(10, 3.8)
    if not rows:
        _say(figure, "no predictor spoke in the pass")
        return figure
    colours = _colours(document["rows"])
    left, right = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row["predictor"] for row in rows):
        mine = [row for row in rows if row["predictor"] == name]
        reach = [row["distance"] for row in mine]
        for axes, values in (
            (left, [row["recall_at_k"] for row in mine]),
            (right, [row["recall_on_misses"]["25%"] for row in mine]),
        ):
            known = [(x, y) for x, y in zip(reach, values, strict=True) if y is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", ms=4, color=colours[name],
                          label=name)  # fmt: skip
    for axes, title in ((left, "recall@k"), (right, "recall on misses of a 25 % LRU")):
        axes.set_ylim(0, 1.02)
        axes.set_xticks(sorted({row["distance"] for row in rows}))
        _label(axes, "layers ahead", title)
    left.legend(fontsize=8.5, frameon=False, loc="lower left")
    return figure


def _layers(document: dict[str, Any]) -> Any:
    """Recall by layer of the nearest forecasts."""
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = _colours(document["rows"])
    for axes, moment, title in (
        (left, "before", "before the token, horizon 1"),
        (right, "in_pass", "in the pass, one layer ahead"),
    ):
        rows = [row for row in document["rows"] if (row["moment"], row["distance"]) == (moment, 1)]
        for row in rows:
            axes.plot(
                [layer["layer_idx"] for layer in row["per_layer"]],
                [layer["recall_at_k"] for layer in row["per_layer"]],
                marker="o",
                ms=4,
                color=colours[row["predictor"]],
                label=row["predictor"],
            )
        axes.set_title(title, **_STYLE)
        axes.set_ylim(0, 1.02)
        _label(axes, "MoE layer", "recall@k" if axes is left else "")
        if rows:
            axes.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    return figure


def _reliability(document: dict[str, Any]) -> Any:
    figure = _figure(10, 4.6)
    _draw_reliability(figure, document)
    return figure


def _draw_reliability(figure: Any, document: dict[str, Any]) -> None:
    colours = _colours(document["rows"])
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, moment, title in zip(
        panels,
        ("before", "in_pass"),
        ("before the token, horizon 1", "in the pass, one layer ahead"),
        strict=True,
    ):
        axes.plot([0, 1], [0, 1], color="#8a8f98", ls="--", lw=1)
        rows = [row for row in document["rows"] if (row["moment"], row["distance"]) == (moment, 1)]
        for row in rows:
            points = row["reliability"]
            axes.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                marker="o",
                ms=3.5,
                lw=1.2,
                color=colours[row["predictor"]],
                label=f"{row['predictor']}: ece {row['ece']:.1%}",
            )
        axes.set_title(title, **_STYLE)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        _label(axes, "forecast probability", "share used" if moment == "before" else "")
        if rows:
            axes.legend(fontsize=8, frameon=False, loc="upper left")


def _colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(row["predictor"] for row in rows)
    return {name: _PALETTE[number % len(_PALETTE)] for number, name in enumerate(names)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, **_STYLE)
    axes.set_ylabel(y, **_STYLE)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _say(figure: Any, text: str) -> None:
    axes = figure.add_subplot()
    axes.text(0.5, 0.5, text, ha="center", va="center", **_STYLE)
    axes.set_axis_off()
