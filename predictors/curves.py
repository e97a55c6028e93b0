"""Curves of a training run, or of a sweep's trials, as a PNG. Needs matplotlib; opens no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collect.durable import durable_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES_NAME = "curves.png"
TRIALS_FIGURE = "trials.png"
_COLOURS = {"loss": "#d9713c", "validation_loss": "#2f6690"}
_RECALL_COLOURS = ("#3f8f63", "#8057a6")


def draw_curves(lines: Sequence[Mapping[str, Any]], folder: Path) -> Path | None:
    """Write `folder`/curves.png: losses and validation recall by epoch; None where no line is of an
    epoch. ModuleNotFoundError without matplotlib.
    """
    epochs = [line for line in lines if "epoch" in line]
    if not epochs:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [line["epoch"] for line in epochs]
    for name, colour in _COLOURS.items():
        label = name.replace("_", " ")
        left.plot(numbers, [line[name] for line in epochs], color=colour, marker="o", label=label)
    left.set(xlabel="epoch", ylabel="loss a layer (nats)")
    left.legend(frameon=False)
    horizons = sorted(int(name[-1]) for name in epochs[0] if name.startswith("recall_"))
    for horizon, colour in zip(horizons, _RECALL_COLOURS, strict=False):
        values = [line[f"recall_{horizon}"] for line in epochs]
        right.plot(numbers, values, color=colour, marker="o", label=f"horizon {horizon}")
    right.set(xlabel="epoch", ylabel="validation recall at k")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(frameon=False)
    return _save(figure, folder / CURVES_NAME)


def draw_trials(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path | None:
    """Write `folder`/trials.png: each trial's recall and the best so far, and recall by epoch; None
    without a figure to draw. `rows` are those of a sweep. ModuleNotFoundError without matplotlib.
    """
    shown = [row for row in rows if row["recall"] is not None]
    if not shown:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for label, colour, marker, is_whole in (
        ("trained to the end", "#2f6690", "o", True),
        ("ended early", "#b0b7bd", "x", False),
    ):
        some = [row for row in shown if (row["state"] == "complete") == is_whole]
        numbers = [row["trial"] for row in some]
        left.scatter(
            numbers, [row["recall"] for row in some], color=colour, marker=marker, label=label
        )
        for row in some:
            epochs = range(1, len(row["recall_by_epoch"]) + 1)
            right.plot(epochs, row["recall_by_epoch"], color=colour, marker=marker, alpha=0.7)
    whole = [row for row in shown if row["state"] == "complete"]
    best = [max(row["recall"] for row in whole[: index + 1]) for index in range(len(whole))]
    left.step(
        [row["trial"] for row in whole], best, where="post", color="#d9713c", label="best so far"
    )
    left.set(xlabel="trial", ylabel="validation recall at k, horizon 1")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.legend(frameon=False)
    right.set(xlabel="epoch")
    return _save(figure, folder / TRIALS_FIGURE)


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.ticker import MaxNLocator

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with durable_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path
