"""Curves of a training run as a PNG, from its metric lines. Needs matplotlib; opens no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..collect.durable import durable_write

CURVES_NAME = "curves.png"
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    path = folder / CURVES_NAME
    with durable_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path
