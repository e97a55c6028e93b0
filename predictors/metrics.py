"""How good forecasts were: definitions of every prediction metric, as pure functions on arrays.

Forecasts are [..., E] probabilities; `topk_ids` [..., k] are the experts really used, largest
router weight first. Knows neither predictors nor caches: which look-ups missed is handed in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CALIBRATION_BINS = 15
"""Equal-mass bins of a calibration error (Guo and others, 2017, take 15 of equal width)."""

LIKELY = 0.5
"""Precision asks of the experts forecast with this probability or more how many were used."""

REPLICATES = 1000
CONFIDENCE = 0.95


def ranked(probability: np.ndarray, count: int) -> np.ndarray:
    """Ids [..., count] of the highest forecasts, highest first, equal ones by ascending id.

    With fewer than `count` experts: all of them.
    """
    return np.argsort(-probability, axis=-1, kind="stable")[..., :count]


def found(ranking: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """Which of the experts used are in a ranking: bool [..., k], in the order of `topk_ids`."""
    return (ranking[..., None, :] == topk_ids[..., :, None]).any(axis=-1)


def top1(ranking: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """Whether the highest forecast is the expert with the largest router weight: bool [...]."""
    return np.equal(ranking[..., 0], topk_ids[..., 0])


def top2(ranking: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """|two highest forecasts in common with the two largest weights| / 2: float [...].

    A model of top-1 routing has one such expert and forecasts one.
    """
    return found(ranking[..., :2], topk_ids[..., :2]).mean(axis=-1)


def recall(ranking: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """|ranking in common with the true set| / k: float [...]. With the k highest forecasts it is
    recall@k, with 2k recall@2k.
    """
    return found(ranking, topk_ids).mean(axis=-1)


def exact(ranking: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """Whether the k highest forecasts are the true set: bool [...]. `ranking` may be longer."""
    return np.all(found(ranking[..., : topk_ids.shape[-1]], topk_ids), axis=-1)


def used(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """The true sets as bool [..., num_experts]."""
    mask = np.zeros((*topk_ids.shape[:-1], num_experts), dtype=bool)
    np.put_along_axis(mask, topk_ids.astype(np.int64), True, axis=-1)
    return mask


def claims(probability: np.ndarray, is_used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(right, all) experts forecast as likely (`LIKELY`): int [...] each; precision is their ratio.

    Over the k highest forecasts precision would be recall@k once more.
    """
    likely = probability >= LIKELY
    return (likely & is_used).sum(axis=-1), likely.sum(axis=-1)


def recall_on_misses(is_found: np.ndarray, is_missed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(foretold, all) look-ups that a cache missed: int [...], over the last axis of both [..., k].

    `is_found` is what `found` gave for the k highest forecasts. The ratio of their sums is the
    recall on misses.
    """
    return (is_found & is_missed).sum(axis=-1), is_missed.sum(axis=-1)


def brier(probability: np.ndarray, is_used: np.ndarray) -> np.ndarray:
    """Mean squared error over all experts: float64 [...] (G. W. Brier, 1950)."""
    return np.square(probability.astype(np.float64) - is_used).mean(axis=-1)


def skill(error: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1 - error / reference: 1 is perfect, 0 as good as the reference. NaN where that is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(reference > 0, 1.0 - error / reference, np.nan)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Forecasts in equal-mass bins: each bin's `count`, and the sums of forecasts and of uses.

    All [..., bins]; leading axes may hold documents, layers or replicates, and adding over them is
    allowed because the bins' edges are common.
    """

    count: np.ndarray
    forecast: np.ndarray
    observed: np.ndarray

    def error(self) -> np.ndarray:
        """Expected calibration error [...]: mean of |forecast - observed| weighted by count."""
        total = self.count.sum(axis=-1)
        gaps = np.abs(self.forecast - self.observed).sum(axis=-1)
        return gaps / np.maximum(total, 1)

    def points(self) -> list[tuple[float, float, int]]:
        """(mean forecast, share used, count) of each bin that is not empty; for one curve."""
        return [
            (float(forecast / count), float(observed / count), int(count))
            for count, forecast, observed in zip(
                self.count, self.forecast, self.observed, strict=True
            )
            if count
        ]


def bin_edges(probability: np.ndarray, *, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Inner edges, ascending and distinct, that cut forecasts of any shape into equal masses.

    Equal forecasts are never torn apart, so there may be fewer bins than asked for.
    """
    inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    # A value of the data itself, so that a bin's edge does not depend on rounding.
    return np.unique(np.quantile(probability, inner, method="inverted_cdf"))


def reliability(
    probability: np.ndarray,
    is_used: np.ndarray,
    *,
    edges: np.ndarray,
    group: np.ndarray | None = None,
    num_groups: int = 1,
) -> Reliability:
    """Bins [num_groups, len(edges) + 1] of forecasts [N] and whether each was used [N].

    `group` [N] is the row each belongs to, such as its document; left out, all are in row 0. A
    forecast equal to an edge belongs below it.
    """
    place = np.searchsorted(edges, probability, side="left")
    bins = len(edges) + 1
    cell = place if group is None else place + group.astype(np.int64) * bins
    size = num_groups * bins

    def counted(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, weights, minlength=size).reshape(num_groups, bins)

    return Reliability(
        counted(None), counted(probability.astype(np.float64)), counted(is_used.astype(np.float64))
    )


def by_document(values: np.ndarray, document: np.ndarray, num_documents: int) -> np.ndarray:
    """Sums [num_documents, ...] of values [T, ...] over each document's tokens (0, 1, ...)."""
    sums = np.zeros((num_documents, *values.shape[1:]))
    np.add.at(sums, document, values)
    return sums


class Bootstrap:
    """Resamples whole documents, since tokens of one document are not independent (B. Efron, 1979).

    Statistics are functions of sums over documents. Percentile intervals; the same `seed` and
    number of documents give the same resamples, so two predictors are compared on equal ones.
    """

    def __init__(self, num_documents: int, *, replicates: int = REPLICATES, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        shares = np.full(num_documents, 1.0 / num_documents)
        self._draws = generator.multinomial(num_documents, shares, size=replicates)

    def totals(self, sums: np.ndarray) -> np.ndarray:
        """Totals [replicates, ...] of per-document sums [num_documents, ...]."""
        flat = sums.reshape(len(sums), -1).astype(np.float64)
        return (self._draws @ flat).reshape(len(self._draws), *sums.shape[1:])

    def interval(
        self,
        statistic: Callable[..., np.ndarray],
        *sums: np.ndarray,
        confidence: float = CONFIDENCE,
    ) -> tuple[float, float] | None:
        """Interval of `statistic(*totals)`, which maps [replicates, ...] each to [replicates].

        Replicates where it is not a number (no misses drawn, say) are left out; None where none is
        left.
        """
        values = statistic(*(self.totals(one) for one in sums))
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        tail = (1.0 - confidence) / 2
        low, high = np.quantile(values, [tail, 1.0 - tail])
        return float(low), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where that is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
