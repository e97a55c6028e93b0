"""Figures of a report, drawn from result documents alone. Needs the extra `plots`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import OutriderError
from ..curves import hit_rate_figure

_PALETTE = (
    "#2f6690", "#d9713c", "#3f8f63", "#8057a6", "#b8860b", "#b0413e", "#2a9d9d", "#8a8f98",
)  # fmt: skip
_WORK = {
    "layer": _PALETTE[7], "experts": _PALETTE[0], "computing": _PALETTE[0], "waiting": _PALETTE[5],
}  # fmt: skip
_DISTANCES = {"before": "before the token", "in_pass": "in the pass", "pre_attention": "pre-att."}


def draw(kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by a title that says what is seen; none for kinds that a table tells better."""
    drawn = {
        "hit-rate": _curves,
        "simulate": _curves_and_roofline,
        "decode": _measured,
        "transfer": _transfers,
        "kernels": _kernels,
        "validate": _validation,
        "evaluate": _distance,
    }.get(kind)
    return drawn(document) if drawn is not None else {}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _curves(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"Hit rate against the share of experts that fits": hit_rate_figure(dict(document))}


def _curves_and_roofline(document: Mapping[str, Any]) -> dict[str, Any]:
    budgets = {row["budget"] for row in document["rows"]}
    curves = _curves(document) if len(budgets) > 1 else {}
    return curves | roofline(document["rows"], what="simulated") | _timelines(document)


def _timelines(document: Mapping[str, Any]) -> dict[str, Any]:
    """A strip an arm: what the processor did above, what the link carried below."""
    lines = document.get("timelines", [])
    if not lines:
        return {}
    what = "simulated" if lines[0]["simulated"] else "measured"
    figure = _figure(9.0, 0.9 + 1.5 * len(lines))
    longest = 1000.0 * max(line["seconds"] for line in lines)
    for number, line in enumerate(lines, start=1):
        axes = figure.add_subplot(len(lines), 1, number)
        for place, lane, colours in (
            (1, "processor", _WORK),
            (0, "link", {"on-demand": _PALETTE[1], "prefetch": _PALETTE[2]}),
        ):
            for kind, colour in colours.items():
                spans = [
                    (1000.0 * one["start_s"], 1000.0 * one["seconds"])
                    for one in line["events"]
                    if one["lane"] == lane and one["name"].split(" ")[0] == kind
                ]
                if not spans:
                    continue
                axes.broken_barh(
                    spans, (place - 0.38, 0.76), facecolors=colour, edgecolor="white",
                    linewidth=0.2, label=kind,
                )  # fmt: skip
        axes.set_yticks([1, 0], ["device", "link"])
        axes.set_xlim(0.0, longest)
        axes.set_title(f"{line['arm']}: {1000 * line['seconds']:.1f} ms", fontsize=9, loc="left")
        axes.legend(fontsize=7, ncols=4, loc="upper right", bbox_to_anchor=(1.0, 1.22))
    figure.get_axes()[-1].set_xlabel(f"ms from the token's start, {what}")
    return {f"One token in time, {what}": figure}


def _measured(document: Mapping[str, Any]) -> dict[str, Any]:
    return roofline(document["rows"], what="measured") | _timelines(document)


def roofline(rows: list[dict[str, Any]], *, what: str) -> dict[str, Any]:
    """Points under their roof: tokens/s against the link's time for the best LRU's misses.

    The roof is 1 / max(that time, time to read a token's weights); rows without misses stand at the
    left edge.
    """
    warm = [row for row in rows if row["cache"] == "warm"] or rows
    points: list[tuple[float, dict[str, Any]]] = []
    for row in warm:
        rate = row.get("link_bytes_per_s") or 0.0
        missed = row["lru_missed_bytes_per_token"]
        points.append((1000.0 * missed / rate if rate else 0.0, row))
    busy = [time for time, _ in points if time > 0.0]
    edge = 0.3 * min(busy, default=1.0)
    flat = max(row["roofline_tokens_per_second"] for row in warm)
    figure = _figure(7.0, 4.6)
    axes = figure.add_subplot()
    right = 3.0 * max(busy, default=1.0)
    ridge: float = 1000.0 / flat
    xs: list[float] = sorted({edge, right, *([ridge] if edge < ridge < right else [])})
    axes.plot(xs, [min(flat, 1000.0 / x) for x in xs], color="#333", label="roofline")
    names = list(dict.fromkeys(_arm(row) for _, row in points))
    for number, name in enumerate(names):
        own = [(max(x, edge), row["tokens_per_second"]) for x, row in points if _arm(row) == name]
        axes.scatter(
            *zip(*own, strict=True),
            label=name,
            color=_PALETTE[number % len(_PALETTE)],
            marker="os^Dv"[number // len(_PALETTE) % 5],
            s=34,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link time for what the best LRU misses, ms a token")
    axes.set_ylabel(f"tokens/s, {what}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return {f"Roofline with {what} points": figure}


def _arm(row: Mapping[str, Any]) -> str:
    if "arm" in row:
        return str(row["arm"])
    predictor = Path(row["predictor"]).name
    if predictor == "none":
        return str(row["policy"])
    return f"{row['policy']} {'+' if row['prefetch'] != 'off' else 'by'} {predictor}"


def _transfers(document: Mapping[str, Any]) -> dict[str, Any]:
    rows = document["rows"]
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    lines = list(dict.fromkeys((row["medium"], row["depth"]) for row in rows))
    for number, (medium, depth) in enumerate(lines):
        own = [row for row in rows if (row["medium"], row["depth"]) == (medium, depth)]
        speeds = [row["gb_per_s"] for row in own]
        axes.errorbar(
            [row["block_bytes"] / 2**20 for row in own],
            speeds,
            yerr=[
                [row["gb_per_s"] - row["spread"]["low"] for row in own],
                [row["spread"]["high"] - row["gb_per_s"] for row in own],
            ],
            marker="o",
            capsize=3,
            label=f"{medium}, {depth} at a time",
            color=_PALETTE[number % len(_PALETTE)],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("block, MiB")
    axes.set_ylabel("GB/s, measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return {"Transfer speed by block size": figure}


def _kernels(document: Mapping[str, Any]) -> dict[str, Any]:
    rows = [row for row in document["rows"] if row["share_of_read"] and row["phase"] == "decode"]
    if not rows:
        return {}
    figure = _figure(8.0, 1.2 + 0.26 * len(rows))
    axes = figure.add_subplot()
    places = list(range(len(rows)))[::-1]
    axes.barh(places, [row["share_of_read"] for row in rows], color=_PALETTE[0], height=0.7)
    axes.set_yticks(
        places, [f"{row['op']}, {row['impl']}, {row['format']}, {row['shape']}" for row in rows]
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("share of a plain read, decode, measured")
    axes.grid(alpha=0.3, axis="x")
    return {"Kernels beside a plain read": figure}


def _validation(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"Simulated against measured": scatter(document)}


def scatter(document: Mapping[str, Any]) -> Any:
    """Simulated over measured tokens/s, the 15 % band, calibration apart from the unseen."""
    rows = document["rows"]
    figure = _figure(6.2, 5.2)
    axes = figure.add_subplot()
    names = ("measured_tokens_per_second", "simulated_tokens_per_second")
    values = [row[name] for row in rows for name in names]
    low, high = 0.8 * min(values), 1.25 * max(values)
    axes.plot([low, high], [low, high], color="#333", lw=1)
    axes.fill_between([low, high], [0.85 * low, 0.85 * high], [1.15 * low, 1.15 * high],
                      color="#2f6690", alpha=0.12, label="within 15 %")  # fmt: skip
    for is_calibration, name, colour in ((True, "calibrated on", "#8a8f98"),
                                         (False, "unseen", "#d9713c")):  # fmt: skip
        own = [row for row in rows if row["is_calibration"] == is_calibration]
        if not own:
            continue
        measured = [row["measured_tokens_per_second"] for row in own]
        axes.errorbar(
            measured,
            [row["simulated_tokens_per_second"] for row in own],
            xerr=[
                [max(0.0, m - row["spread"]["low"]) for m, row in zip(measured, own, strict=True)],
                [max(0.0, row["spread"]["high"] - m) for m, row in zip(measured, own, strict=True)],
            ],
            fmt="o",
            markersize=5,
            capsize=2,
            lw=0.8,
            color=colour,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens/s, measured")
    axes.set_ylabel("tokens/s, simulated")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG. OutriderError for a bad path."""
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise OutriderError(f"plot: {path} cannot be written: {error}") from error


def _distance(document: Mapping[str, Any]) -> dict[str, Any]:
    figure = _figure(8.5, 4.2)
    axes = figure.add_subplot()
    lines = list(dict.fromkeys((row["predictor"], row["moment"]) for row in document["rows"]))
    for number, (predictor, moment) in enumerate(lines):
        own = sorted(
            (row["distance"], row["recall_at_k"])
            for row in document["rows"]
            if (row["predictor"], row["moment"]) == (predictor, moment)
        )
        axes.plot(
            *zip(*own, strict=True),
            marker="o" if moment == "in_pass" else "s",
            linestyle="-" if moment == "in_pass" else ":",
            label=f"{predictor}, {_DISTANCES.get(moment, moment)}",
            color=_PALETTE[number % len(_PALETTE)],
        )
    axes.set_xlabel("distance: layers in the pass, tokens before it")
    axes.set_ylabel("recall@k")
    axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return {"Recall against lookahead distance": figure}
