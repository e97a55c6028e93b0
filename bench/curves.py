"""Hit-rate curves against the budget, from a document. Needs the extra `plots`."""

from pathlib import Path
from typing import Any

from ..runtime.errors import OutriderError
from .plot import require


def series(
    document: dict[str, Any], *, state: str = "warm"
) -> dict[str, list[tuple[float, float]]]:
    """(share of the experts, hit rate) by arm, budgets ascending; the first link's rows."""
    link = document["rows"][0]["link_bytes_per_s"]
    found: dict[str, dict[float, float]] = {}
    for row in document["rows"]:
        if row["cache"] != state or row["link_bytes_per_s"] != link or row["hit_rate"] is None:
            continue
        share = row["slots"] / row["experts"]
        found.setdefault(label(row), {})[share] = row["hit_rate"]
    return {name: sorted(points.items()) for name, points in found.items()}


def label(row: dict[str, Any]) -> str:
    """What an arm is called in figures: a + for prefetching."""
    predictor = Path(row["predictor"]).name
    if predictor == "none":
        return row["policy"]
    return (
        f"{row['policy']} + {predictor}"
        if row["prefetch"] != "off"
        else (f"{row['policy']} by {predictor}")
    )


def plot_hit_rates(document: dict[str, Any], path: Path) -> None:
    """Draw `hit_rate_figure` into a PNG file. OutriderError for a bad path."""
    require()
    try:
        hit_rate_figure(document).savefig(path, dpi=150, format="png")
    except OSError as error:
        raise OutriderError(f"plot: {path} cannot be written: {error}") from error


def hit_rate_figure(document: dict[str, Any]) -> Any:
    """Two panels, demand-only and prefetching, Belady in both. Needs matplotlib."""
    from matplotlib.figure import Figure

    curves = series(document)
    demand = {name: points for name, points in curves.items() if " + " not in name}
    ahead = {name: points for name, points in curves.items() if " + " in name}
    panels = [("nothing read ahead", demand), ("reading ahead", ahead)]
    panels = [(title, shown) for title, shown in panels if shown]
    figure = Figure(figsize=(1.0 + 5.0 * len(panels), 4.6), layout="constrained")
    for number, (title, shown) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in shown.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name,
                      color="black" if name == "belady" else None)  # fmt: skip
        if title == "reading ahead" and "belady" in demand:
            axes.plot(*zip(*demand["belady"], strict=True), color="black", linestyle="dashed",
                      label="belady, nothing read ahead")  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("share of the experts that fits")
        axes.set_ylabel("hit rate, decode, warm")
        axes.set_ylim(0.0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    settings = document["settings"]
    figure.suptitle(
        f"{settings['model_shape']}: replay of {settings['tokens']} tokens of "
        f"{settings['documents']} documents",
        fontsize=9,
    )
    return figure
