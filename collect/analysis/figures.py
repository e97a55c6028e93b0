"""The figures of an analysis, each drawn from the document alone. Needs matplotlib; opens no
window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .document import Analysis, LayerFigures
from .measures import lift

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6690", "#d9713c", "#3f8f63", "#8057a6", "#8a8f98"
_PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#b0413e", "#2a9d9d", GREY)
_STYLE = {"fontsize": 10, "color": "#333"}


def draw(analysis: Analysis) -> dict[str, Figure]:
    """Every figure by its file name without ending, in the order of the page."""
    return {
        "usage": usage(analysis),
        "entropy": entropies(analysis),
        "cooccurrence": cooccurrence(analysis),
        "specialization": specialization(analysis),
        "reuse": reuse(analysis),
        "predictability": predictability(analysis),
        "drift": drift(analysis),
    }


def usage(analysis: Analysis) -> Figure:
    """Layers x experts: how much oftener than balanced use each expert is chosen."""
    shape = analysis.shape
    balanced = shape.top_k / shape.num_experts
    relative = np.array([layer.usage for layer in analysis.layers]) / balanced
    figure = _figure(10, 1.6 + 0.28 * max(len(relative), 4))
    axes = figure.add_subplot()
    logs = np.log2(np.clip(relative, 1 / 8, 8))
    reach = max(float(np.abs(logs).max()), 0.5)
    image = axes.imshow(
        logs,
        aspect="auto",
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -reach, reach),
        interpolation="nearest",
    )
    axes.set_xlabel("expert", **_STYLE)
    axes.set_ylabel("MoE layer", **_STYLE)
    axes.set_yticks(_few(len(relative)))
    ticks = [tick for tick in (-3, -2, -1, 0, 1, 2, 3) if abs(tick) <= reach]
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=ticks)
    bar.ax.set_yticklabels([f"{2.0**tick:g}x" for tick in ticks])
    bar.set_label("use, relative to balanced", **_STYLE)
    return figure


def entropies(analysis: Analysis) -> Figure:
    """By layer: entropy of usage, of the router's own choice, and what stays open once the past is
    known.
    """
    figure = _figure(10, 3.8)
    axes = figure.add_subplot()
    layers = [layer.layer_idx for layer in analysis.layers]
    lines = (
        ("usage of all tokens", "routing_entropy", BLUE),
        ("router's probabilities, mean of one token", "router_entropy", ORANGE),
        ("next token's first expert, this one's known", "next_token_entropy", GREEN),
        ("next layer's first expert, this one's known", "next_layer_entropy", PURPLE),
    )
    for label, name, color in lines:
        values = [getattr(layer, name) for layer in analysis.layers]
        known = [(x, y) for x, y in zip(layers, values, strict=True) if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", ms=4, color=color, label=label)
    most = np.log2(analysis.shape.num_experts)
    axes.axhline(
        most, color=GREY, ls="--", lw=1, label=f"most possible: log2 {analysis.shape.num_experts}"
    )
    axes.set_ylim(0, most * 1.08)
    axes.set_xticks(_few(len(layers)))
    _label(axes, "MoE layer", "bits")
    axes.legend(fontsize=8.5, frameon=False, loc="lower center", ncols=2)
    return figure


def cooccurrence(analysis: Analysis) -> Figure:
    """Lift of expert pairs in the layer whose groups are clearest, experts ordered by group."""
    figure = _figure(10, 4.9)
    layer = clearest_layer(analysis)
    if layer is None or layer.joint is None:
        _say(figure, "too many experts, or too little variety, to show pairs")
        return figure
    labels = np.array(layer.clusters[0].labels)
    order = np.argsort(labels, kind="stable")
    lifts = lift(np.array(layer.joint), analysis.tokens)[order][:, order]
    np.fill_diagonal(lifts, np.nan)
    logs = np.log2(np.clip(lifts, 1 / 8, 8))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    image = left.imshow(logs, cmap="RdBu_r", norm=TwoSlopeNorm(0, -3, 3), interpolation="nearest")
    for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
        left.axhline(edge, color="black", lw=0.6)
        left.axvline(edge, color="black", lw=0.6)
    left.set_title(f"layer {layer.layer_idx}: chosen together", **_STYLE)
    left.set_xlabel("expert, by group", **_STYLE)
    left.set_xticks([])
    left.set_yticks([])
    bar = figure.colorbar(image, ax=left, ticks=[-3, -1.5, 0, 1.5, 3], fraction=0.046)
    bar.ax.set_yticklabels(["1/8x", "1/3x", "chance", "3x", "8x"])
    sources = list(dict.fromkeys(c.source for each in analysis.layers for c in each.clusters))
    for source, color in zip(sources, _PALETTE, strict=False):
        found = [
            (e.layer_idx, c) for e in analysis.layers for c in e.clusters if c.source == source
        ]
        places = [layer_idx for layer_idx, _ in found]
        right.plot(
            places, [c.silhouette for _, c in found], marker="o", ms=4, color=color, label=source
        )
        right.plot(places, [c.stability for _, c in found], ls=":", color=color)
    right.set_title("how clear the groups are", **_STYLE)
    right.set_ylim(-0.1, 1.02)
    right.set_xticks(_few(len(analysis.layers)))
    _label(right, "MoE layer", "silhouette (solid), stability (dotted)")
    right.legend(fontsize=8.5, frameon=False)
    return figure


def specialization(analysis: Analysis) -> Figure:
    """What the token and the data set tell about the expert, and one layer's experts by
    data set.
    """
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    layers = np.arange(len(analysis.layers))
    for offset, label, name, color in (
        (-0.2, "token id", "token_information", BLUE),
        (0.2, "data set", "dataset_information", ORANGE),
    ):
        part = [
            getattr(layer, name) / max(layer.routing_entropy, 1e-9) for layer in analysis.layers
        ]
        left.bar(layers + offset, part, width=0.4, color=color, label=label)
    left.set_xticks(_few(len(layers)))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    _label(left, "MoE layer", "of the choice explained")
    left.legend(fontsize=8.5, frameon=False)
    chosen = max(analysis.layers, key=lambda layer: layer.dataset_information).layer_idx
    names = list(analysis.datasets)
    rows = np.array(
        [
            [expert.dataset_lift[name] for name in names]
            for expert in analysis.experts
            if expert.layer_idx == chosen
        ]
    )
    if len(names) < 2:
        _say(right, "one data set only")
        return figure
    order = np.lexsort((-rows.max(axis=1), rows.argmax(axis=1)))
    logs = np.log2(np.clip(rows[order].T, 1 / 8, 8))
    image = right.imshow(logs, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -3, 3))
    right.set_yticks(range(len(names)), names, fontsize=9)
    right.set_xticks([])
    right.set_xlabel("expert, by the data set it prefers", **_STYLE)
    right.set_title(f"layer {chosen}: use by data set", **_STYLE)
    bar = figure.colorbar(image, ax=right, ticks=[-3, 0, 3], pad=0.02)
    bar.ax.set_yticklabels(["1/8x", "average", "8x"])
    return figure


def reuse(analysis: Analysis) -> Figure:
    """After how many tokens experts come back, and what LRU caches of each size would hit."""
    figure = _figure(10, 3.9)
    left, right = figure.subplots(1, 2)
    bins = max((len(layer.reuse_gaps) for layer in analysis.layers), default=1) or 1
    gaps = np.array(
        [layer.reuse_gaps + [0.0] * (bins - len(layer.reuse_gaps)) for layer in analysis.layers]
    )
    # Beyond the bins that hold 99.9 % of the uses only the axis would grow.
    bins = min(bins, int(np.searchsorted(np.cumsum(gaps.mean(axis=0)), 0.999)) + 1)
    gaps = gaps[:, :bins]
    left.bar(range(bins), gaps.mean(axis=0), color=BLUE, width=0.75)
    spread = np.stack([gaps.mean(0) - gaps.min(0), gaps.max(0) - gaps.mean(0)])
    left.errorbar(range(bins), gaps.mean(axis=0), yerr=spread, fmt="none", ecolor="#444", lw=0.8)
    names = [str(2**i) if i == 0 else f"{2**i}-{2 ** (i + 1) - 1}" for i in range(bins)]
    left.set_xticks(range(bins), names, rotation=60, fontsize=8)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    _label(left, "tokens since the last use", "share of uses (lines: over layers)")
    own = np.array([layer.lru_hit_rate for layer in analysis.layers])
    budget = np.linspace(0, 1, own.shape[1])
    right.fill_between(budget, own.min(0), own.max(0), color=BLUE, alpha=0.18, lw=0)
    right.plot(budget, own.mean(0), color=BLUE, label="a cache for each layer (band: over layers)")
    slots = np.array(analysis.lru.slots) / analysis.shape.num_routed_experts
    right.plot(slots, analysis.lru.hit_rate, color=ORANGE, label="one cache for all layers")
    right.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="uses at random")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    _label(right, "experts that fit into the cache", "LRU hit rate")
    right.legend(fontsize=8.5, frameon=False, loc="lower right")
    return figure


def predictability(analysis: Analysis) -> Figure:
    """Bounds by layer: chance, always the most used, the previous token's experts."""
    figure = _figure(10, 3.6)
    axes = figure.add_subplot()
    layers = [layer.layer_idx for layer in analysis.layers]
    for label, name, color in (
        ("the previous token's experts", "previous_overlap", GREEN),
        ("always the k most used", "frequency_recall", BLUE),
        ("the previous token's, if tokens were independent", "chance_overlap", PURPLE),
    ):
        axes.plot(
            layers,
            [getattr(e, name) for e in analysis.layers],
            marker="o",
            ms=4,
            color=color,
            label=label,
        )
    shape = analysis.shape
    axes.axhline(shape.top_k / shape.num_experts, color=GREY, ls="--", lw=1, label="chance: k / E")
    axes.set_xticks(_few(len(layers)))
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _label(axes, "MoE layer", f"recall at {shape.top_k}")
    axes.legend(fontsize=8.5, frameon=False, ncols=2)
    return figure


def drift(analysis: Analysis) -> Figure:
    """Coverage as traces come in; how usage moves along the text and over the collection."""
    figure = _figure(10, 3.5)
    left, middle, right = figure.subplots(1, 3)
    parts = np.arange(1, len(analysis.coverage_over_time) + 1) / len(analysis.coverage_over_time)
    left.plot(parts, analysis.coverage_over_time, color=BLUE)
    left.set_ylim(0, 1.03)
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    _label(left, "of the collection", "experts met so far")
    over_time = np.array([layer.drift_over_time for layer in analysis.layers])
    _band(middle, parts, over_time, ORANGE)
    middle.xaxis.set_major_formatter(PercentFormatter(1))
    _label(middle, "of the collection", "drift of usage (bits)")
    in_text = np.array([layer.drift_in_text for layer in analysis.layers])
    _band(right, np.arange(1, in_text.shape[1] + 1), in_text, GREEN)
    _label(right, "part of the window", "drift of usage (bits)")
    return figure


def compared(analyses: Mapping[str, Analysis]) -> Figure:
    """LRU hit rates and entropies of several models on one scale."""
    figure = _figure(10, 3.9)
    left, right = figure.subplots(1, 2)
    for (name, analysis), color in zip(analyses.items(), _PALETTE * len(analyses), strict=False):
        slots = np.array(analysis.lru.slots) / analysis.shape.num_routed_experts
        left.plot(slots, analysis.lru.hit_rate, color=color, label=name)
        depth = np.linspace(0, 1, len(analysis.layers))
        most = np.log2(max(analysis.shape.num_experts, 2))
        values = [layer.routing_entropy / most for layer in analysis.layers]
        right.plot(depth, values, marker="o", ms=4, color=color, label=name)
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    _label(left, "experts that fit into one cache", "LRU hit rate")
    right.set_xticks([0, 1], ["first", "last"])
    right.yaxis.set_major_formatter(PercentFormatter(1))
    _label(right, "MoE layer", "entropy of usage, of the most possible")
    left.legend(fontsize=8.5, frameon=False, loc="lower right")
    return figure


def clearest_layer(analysis: Analysis) -> LayerFigures | None:
    """The layer whose co-activation groups have the best silhouette; None without such groups."""
    grouped = [e for e in analysis.layers if e.clusters and e.clusters[0].source == "co-activation"]
    return max(grouped, key=lambda layer: layer.clusters[0].silhouette, default=None)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, **_STYLE)
    axes.set_ylabel(y, **_STYLE)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, color: str) -> None:
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    axes.plot(x, values.mean(0), color=color)
    axes.set_ylim(0, None)


def _few(number: int) -> Sequence[int]:
    step = max(1, -(-number // 16))
    return range(0, number, step)


def _say(place: Figure | Axes, text: str) -> None:
    axes = place.add_subplot() if isinstance(place, Figure) else place
    axes.text(0.5, 0.5, text, ha="center", va="center", **_STYLE)
    axes.set_axis_off()
