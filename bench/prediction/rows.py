"""From judged forecasts to rows: INTERFACES' fields, overall and by layer, with their intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...predictors import metrics
from ...predictors.metrics import Bootstrap
from .judge import COLUMNS, Judged
from .replay import BEFORE, Kind

RATES = ("top1", "top2", "recall_at_k", "recall_at_2k", "exact")


@dataclass(frozen=True, slots=True)
class Context:
    """What all rows of a run share.

    `is_missed` maps a budget to bool [N, L, k]; `reference_brier` maps a horizon to the error of
    token statistics [N, L] at that horizon, NaN where they said nothing.
    """

    bootstrap: Bootstrap
    num_documents: int
    is_missed: Mapping[str, np.ndarray]
    reference_brier: Mapping[int, np.ndarray]


def make_row(
    kind: Kind, judged: Judged, *, context: Context, fallback: Judged | None
) -> dict[str, Any]:
    """The measured fields of one row; identity, cost and surroundings are the caller's to add.

    `fallback` is the same predictor's forecast before the token, which is the best there is of
    layers that an in-pass forecast of this distance does not reach; None counts as not foretold.
    Rates are over all tokens and layers forecast; `ece` is the mean of the layers' own errors, so
    that errors of opposite sign in two layers do not cancel.
    """
    moment, distance = kind
    document, documents = judged.document, context.num_documents
    sums = metrics.by_document(judged.values, document, documents)  # [D, L, columns]
    ci: dict[str, Any] = {}
    row: dict[str, Any] = {}
    for name in RATES:
        row[name], ci[name] = _rate(context, _of(sums, name), _of(sums, "count"))
    row["precision"], ci["precision"] = _rate(context, _of(sums, "right"), _of(sums, "claimed"))
    foretold, is_counted = judged.is_found, judged.is_forecast
    if moment != BEFORE:
        foretold = _filled(judged, fallback)
        is_counted = np.ones_like(is_counted)
    row["recall_on_misses"], ci["recall_on_misses"] = {}, {}
    for budget, is_missed in context.is_missed.items():
        hit, missed = _miss_sums(context, foretold, is_missed & is_counted[..., None], document)
        value, interval = _rate(context, hit.sum(axis=1), missed.sum(axis=1))
        row["recall_on_misses"][budget], ci["recall_on_misses"][budget] = value, interval
    bins = _reliability(judged, documents)
    row["ece"] = _number(np.array(_mean_error(*_stacked(bins))))
    ci["ece"] = _pair(context.bootstrap.interval(_mean_error, *_per_document(bins)))
    reference = context.reference_brier[distance if moment == BEFORE else 1]
    errors = _skill_sums(judged, reference, documents)
    row["brier_skill"] = _number(metrics.skill(*(one.sum() for one in errors)))
    ci["brier_skill"] = _pair(
        context.bootstrap.interval(metrics.skill, *(one.sum(axis=1) for one in errors))
    )
    row["ci"] = ci
    row["tokens"] = int(judged.is_forecast.any(axis=1).sum())
    row["per_layer"] = _by_layer(judged, sums, errors, bins, context)
    row["reliability"] = _curve(judged)
    return row


def _of(sums: np.ndarray, name: str) -> np.ndarray:
    return sums[..., COLUMNS.index(name)].sum(axis=1)


def _rate(
    context: Context, numerator: np.ndarray, denominator: np.ndarray
) -> tuple[float | None, list[float] | None]:
    value = _number(metrics.ratio(numerator.sum(), denominator.sum()))
    return value, _pair(context.bootstrap.interval(metrics.ratio, numerator, denominator))


def _filled(judged: Judged, fallback: Judged | None) -> np.ndarray:
    if fallback is None:
        return judged.is_found
    return np.where(judged.is_forecast[..., None], judged.is_found, fallback.is_found)


def _miss_sums(
    context: Context, foretold: np.ndarray, is_missed: np.ndarray, document: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[D, L] look-ups foretold, and all that missed."""
    pair = metrics.recall_on_misses(foretold, is_missed)
    sums = metrics.by_document(np.stack(pair, axis=-1), document, context.num_documents)
    return sums[..., 0], sums[..., 1]


def _reliability(judged: Judged, documents: int) -> list[metrics.Reliability]:
    """A table a layer, a row a document; empty for layers that were never forecast."""
    tables = []
    for layer_idx in range(judged.high.shape[1]):
        rows = judged.is_forecast[:, layer_idx]
        high, is_used = judged.high[rows, layer_idx], judged.is_high_used[rows, layer_idx]
        group = np.repeat(judged.document[rows], high.shape[1])
        edges = metrics.bin_edges(high) if high.size else np.zeros(0)
        tables.append(
            metrics.reliability(
                high.reshape(-1),
                is_used.reshape(-1),
                edges=edges,
                group=group,
                num_groups=documents,
            )
        )
    return tables


def _per_document(bins: list[metrics.Reliability]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, forecast and observed sums [D, L, bins], padded with empty bins."""
    width = max(table.count.shape[1] for table in bins)

    def padded(name: str) -> np.ndarray:
        parts = [getattr(table, name) for table in bins]
        return np.stack(
            [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts], axis=1
        )

    return padded("count"), padded("forecast"), padded("observed")


def _stacked(bins: list[metrics.Reliability]) -> tuple[np.ndarray, ...]:
    return tuple(part.sum(axis=0) for part in _per_document(bins))


def _mean_error(count: np.ndarray, forecast: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean over the layers that were forecast of their calibration errors; [..., L, bins] each."""
    errors = metrics.Reliability(count, forecast, observed).error()
    is_forecast = count.sum(axis=-1) > 0
    return metrics.ratio((errors * is_forecast).sum(axis=-1), is_forecast.sum(axis=-1))


def _skill_sums(
    judged: Judged, reference: np.ndarray, documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed errors [D, L] of the predictor and of the reference, where both said something."""
    both = judged.is_forecast & np.isfinite(reference)
    mine = metrics.by_document(
        np.where(both, judged.column("brier"), 0.0), judged.document, documents
    )
    other = metrics.by_document(np.where(both, reference, 0.0), judged.document, documents)
    return mine, other


def _by_layer(
    judged: Judged,
    sums: np.ndarray,
    errors: tuple[np.ndarray, np.ndarray],
    bins: list[metrics.Reliability],
    context: Context,
) -> list[dict[str, Any]]:
    totals = sums.sum(axis=0)  # [L, columns]
    mine, other = (one.sum(axis=0) for one in errors)
    layers = []
    for layer_idx, values in enumerate(totals):
        by_name = dict(zip(COLUMNS, values, strict=True))
        if not by_name["count"]:
            continue
        found = judged.is_found[:, layer_idx]
        rows = judged.is_forecast[:, layer_idx]
        recalls = {}
        for budget, is_missed in context.is_missed.items():
            pair = metrics.recall_on_misses(found[rows], is_missed[rows, layer_idx])
            recalls[budget] = _number(metrics.ratio(pair[0].sum(), pair[1].sum()))
        table = bins[layer_idx]
        pooled = metrics.Reliability(
            table.count.sum(axis=0), table.forecast.sum(axis=0), table.observed.sum(axis=0)
        )
        layers.append(
            {
                "layer_idx": layer_idx,
                **{name: by_name[name] / by_name["count"] for name in RATES},
                "precision": _number(metrics.ratio(by_name["right"], by_name["claimed"])),
                "recall_on_misses": recalls,
                "ece": _number(pooled.error()),
                "brier_skill": _number(metrics.skill(mine[layer_idx], other[layer_idx])),
            }
        )
    return layers


def _curve(judged: Judged) -> list[list[float]]:
    """[mean forecast, share used, count] a bin, all layers together: the reliability plot."""
    rows = judged.is_forecast
    high, is_used = judged.high[rows].reshape(-1), judged.is_high_used[rows].reshape(-1)
    if not high.size:
        return []
    table = metrics.reliability(high, is_used, edges=metrics.bin_edges(high))
    pooled = metrics.Reliability(table.count[0], table.forecast[0], table.observed[0])
    return [list(point) for point in pooled.points()]


def _number(value: np.ndarray | float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(value) if np.isfinite(value) else None


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
