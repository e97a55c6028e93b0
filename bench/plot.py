"""Figures of bench documents. Needs the extra `plots`; draws into files only."""

from pathlib import Path
from typing import Any

from ..runtime.errors import OutriderError, UsageError

_COLOURS = {"resident": "#4c72b0", "on-demand": "#dd8452", "prefetch": "#55a868"}
_OTHER_COLOUR = "#8c8c8c"


def require() -> None:
    """Raise UsageError, before anything is measured, where matplotlib is not installed."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "plot: drawing needs matplotlib, which is not installed; install it with "
            "pip install 'outrider[plots]', or use --json"
        ) from error


def _label(row: dict[str, Any], *, has_format: bool) -> str:
    arm, _, predictor = row["arm"].partition(":")
    parts = [*arm.split("-resident"), Path(predictor).name, row["format"] if has_format else ""]
    return "\n".join([*filter(None, parts), row["budget"]])


def plot_decode(document: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s with their intervals, a panel a state of the caches, and each roofline."""
    require()
    from matplotlib.figure import Figure

    rows = document["rows"]
    states = list(dict.fromkeys(row["cache"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    figure = Figure(
        figsize=(1.5 + max(4.0, 0.75 * len(rows) / len(states)) * len(states), 4.2),
        layout="constrained",
    )
    for panel, state in enumerate(states, start=1):
        shown = [row for row in rows if row["cache"] == state]
        axes = figure.add_subplot(1, len(states), panel)
        places = range(len(shown))
        speeds = [row["tokens_per_second"] for row in shown]
        below = [row["tokens_per_second"] - row["spread"]["low"] for row in shown]
        above = [row["spread"]["high"] - row["tokens_per_second"] for row in shown]
        axes.bar(
            places,
            speeds,
            yerr=[below, above],
            capsize=4,
            color=[_COLOURS.get(row["arm"], _OTHER_COLOUR) for row in shown],
        )
        axes.hlines(
            [row["roofline_tokens_per_second"] for row in shown],
            [place - 0.4 for place in places],
            [place + 0.4 for place in places],
            colors="black",
            linestyles="dashed",
            label="roofline",
        )
        axes.set_yscale("log")
        labels = [_label(row, has_format=len(formats) > 1) for row in shown]
        axes.set_xticks(places, labels, fontsize=7)
        axes.set_title(f"{state} caches")
        axes.set_ylabel("tokens/s")
        axes.legend()
    first = rows[0]
    device = first.get("device_name") or first["cpu"]  # older documents name the processor only
    figure.suptitle(
        f"{Path(first['model']).name}, {', '.join(formats)}, {device}, "
        f"median of {first['repetitions']}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise OutriderError(f"plot: {path} cannot be written: {error}") from error
