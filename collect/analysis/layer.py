"""From counts to the figures of one layer, one expert and all layers together. Pure; reads
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .clusters import Clustering
from .contexts import ExpertContexts
from .counts import RoutingCounts
from .document import (
    MAX_JOINT_EXPERTS,
    DatasetFigures,
    ExpertFigures,
    ExpertPair,
    LayerFigures,
    LruCurve,
    OverallFigures,
    TextContext,
    TokenUse,
)
from .measures import (
    concentration,
    conditional_entropy,
    divergence,
    entropy,
    frequency_bound,
    gini,
    lift,
    mutual_information,
)
from .reuse import hit_rates

_TOP_PAIRS = 10
_TOP_TOKENS = 10
# A pair or token met less often says little about chance.
_MIN_COUNT = 5
_MAX_CURVE_POINTS = 256


def layer_figures(
    counts: RoutingCounts, layer_idx: int, clusters: Sequence[Clustering]
) -> LayerFigures:
    """All figures of one layer."""
    usage = counts.usage[:, layer_idx].sum(axis=0)
    tokens = int(counts.tokens.sum())
    top_k = counts.shape.top_k
    joint, token_steps = counts.joint[layer_idx], counts.token_steps[layer_idx]
    next_layer = counts.layer_steps[layer_idx] if layer_idx < len(counts.layer_steps) else None
    gaps = counts.reuse.gaps[layer_idx]
    used_bins = int(np.flatnonzero(gaps)[-1]) + 1 if gaps.any() else 0
    share = usage / max(tokens, 1)
    return LayerFigures(
        layer_idx=layer_idx,
        usage=_listed(share),
        coverage=_round((usage > 0).mean()),
        routing_entropy=_round(entropy(usage)),
        router_entropy=_round(counts.router_entropy[layer_idx] / counts.entropy_tokens)
        if counts.entropy_tokens
        else None,
        concentration=_round(concentration(usage)),
        gini=_round(gini(usage)),
        unique_pairs=int((counts.top_pairs[layer_idx] > 0).sum()),
        top_pairs=_pairs(joint, tokens, by_lift=False),
        top_lifts=_pairs(joint, tokens, by_lift=True),
        joint=joint.tolist() if len(joint) <= MAX_JOINT_EXPERTS else None,
        dataset_information=_round(mutual_information(counts.usage[:, layer_idx])),
        token_information=_round(mutual_information(counts.token_usage[layer_idx])),
        previous_overlap=_round(counts.overlap[layer_idx] / max(counts.overlap_tokens * top_k, 1)),
        chance_overlap=_round((share**2).sum() / top_k),
        previous_top1=_round(np.trace(token_steps) / max(token_steps.sum(), 1)),
        frequency_recall=_round(frequency_bound(usage, top_k)),
        frequency_top1=_round(frequency_bound(counts.first_usage[layer_idx], 1)),
        next_token_entropy=_round(conditional_entropy(token_steps)),
        next_token_information=_round(mutual_information(token_steps)),
        next_layer_entropy=None if next_layer is None else _round(conditional_entropy(next_layer)),
        next_layer_information=None
        if next_layer is None
        else _round(mutual_information(next_layer)),
        mean_reuse_gap=_round(counts.reuse.gap_sums[layer_idx] / max(gaps.sum(), 1)),
        reuse_gaps=_listed(gaps[:used_bins] / max(gaps.sum(), 1)),
        lru_hit_rate=_listed(hit_rates(counts.reuse.layer_depths[layer_idx])),
        drift_in_text=_listed(divergence(counts.part_usage[:, layer_idx], usage[None])),
        drift_over_time=_listed(divergence(counts.period_usage[:, layer_idx], usage[None])),
        clusters=list(clusters),
    )


def expert_figures(
    counts: RoutingCounts, contexts: ExpertContexts, decode: Callable[[Sequence[int]], str]
) -> list[ExpertFigures]:
    """Every expert of every layer, in order; `decode` turns token ids into text."""
    token_ids = np.fromiter(counts.token_rows, dtype=np.int64, count=len(counts.token_rows))
    per_dataset = counts.usage / np.maximum(counts.tokens, 1)[:, None, None]
    overall = counts.usage.sum(axis=0) / max(int(counts.tokens.sum()), 1)
    figures = []
    for layer_idx, expert_idx in np.ndindex(overall.shape):
        share = overall[layer_idx, expert_idx]
        rates = per_dataset[:, layer_idx, expert_idx] / (share or 1)
        figures.append(
            ExpertFigures(
                layer_idx=layer_idx,
                expert_idx=expert_idx,
                share=_round(share),
                dataset_lift=dict(zip(counts.dataset_names, _listed(rates), strict=True)),
                top_tokens=_tokens(
                    counts, layer_idx, expert_idx, token_ids=token_ids, decode=decode
                ),
                contexts=[
                    TextContext(
                        weight=_round(place.weight),
                        dataset=place.dataset,
                        sample_id=place.sample_id,
                        before=decode(place.before),
                        token=decode([place.token_id]),
                        after=decode(place.after),
                    )
                    for place in contexts.places(layer_idx, expert_idx)
                ],
            )
        )
    return figures


def overall_figures(counts: RoutingCounts, layers: Sequence[LayerFigures]) -> OverallFigures:
    """Means over the layers; counted over all data sets."""
    usage = counts.usage.sum(axis=0)
    experts = counts.shape.num_experts

    def mean(name: str) -> float:
        return _round(np.mean([getattr(layer, name) for layer in layers]))

    def mean_known(name: str) -> float | None:
        known = [v for layer in layers if (v := getattr(layer, name)) is not None]
        return _round(np.mean(known)) if known else None

    def extreme(flat: int) -> tuple[int, int, float]:
        layer_idx, expert_idx = divmod(flat, experts)
        return layer_idx, expert_idx, layers[layer_idx].usage[expert_idx]

    return OverallFigures(
        coverage=mean("coverage"),
        experts_used=int((usage > 0).sum()),
        experts_per_layer=_round((usage > 0).sum(axis=1).mean()),
        unique_pairs=sum(layer.unique_pairs for layer in layers),
        routing_entropy=mean("routing_entropy"),
        normalized_entropy=_round(entropy(usage).mean() / np.log2(max(experts, 2))),
        effective_experts=_round((2 ** entropy(usage)).mean()),
        router_entropy=mean_known("router_entropy"),
        concentration=mean("concentration"),
        gini=mean("gini"),
        dataset_information=mean("dataset_information"),
        token_information=mean("token_information"),
        previous_overlap=mean("previous_overlap"),
        chance_overlap=mean("chance_overlap"),
        previous_top1=mean("previous_top1"),
        frequency_recall=mean("frequency_recall"),
        frequency_top1=mean("frequency_top1"),
        next_token_information=mean("next_token_information"),
        next_layer_information=mean_known("next_layer_information"),
        mean_reuse_gap=mean("mean_reuse_gap"),
        most_used=extreme(int(usage.argmax())),
        least_used=extreme(int(usage.argmin())),
    )


def dataset_figures(counts: RoutingCounts) -> dict[str, DatasetFigures]:
    """The short figures of each data set."""
    return {
        name: DatasetFigures(
            traces=int(counts.samples[i]),
            tokens=int(counts.tokens[i]),
            coverage=_round((counts.usage[i] > 0).mean()),
            unique_pairs=int(counts.top_pairs_by_dataset[i].sum()),
            routing_entropy=_round(entropy(counts.usage[i]).mean()),
        )
        for i, name in enumerate(counts.dataset_names)
    }


def lru_curve(counts: RoutingCounts) -> LruCurve:
    """The curve of one cache for all layers, at 257 sizes at most."""
    rates = hit_rates(counts.reuse.global_depths)
    slots = np.unique(np.linspace(0, len(rates) - 1, _MAX_CURVE_POINTS + 1).astype(np.int64))
    return LruCurve(
        tokens=counts.reuse.global_steps, slots=slots.tolist(), hit_rate=_listed(rates[slots])
    )


def coverage_over_time(counts: RoutingCounts) -> list[float]:
    """Share of experts met by the end of each part of the collection, mean over layers."""
    met = np.cumsum(counts.period_usage, axis=0) > 0
    return _listed(met.mean(axis=(1, 2)))


def _pairs(joint: np.ndarray, tokens: int, *, by_lift: bool) -> list[ExpertPair]:
    lifts = lift(joint, tokens)
    low, high = np.triu_indices(len(joint), k=1)
    order_by = (
        np.where(joint[low, high] >= _MIN_COUNT, lifts[low, high], 0)
        if by_lift
        else joint[low, high]
    )
    best = np.argsort(-order_by, kind="stable")[:_TOP_PAIRS]
    return [
        ExpertPair(
            experts=(int(low[i]), int(high[i])),
            count=int(joint[low[i], high[i]]),
            lift=_round(lifts[low[i], high[i]]),
        )
        for i in best
        if order_by[i] > 0
    ]


def _tokens(
    counts: RoutingCounts,
    layer_idx: int,
    expert_idx: int,
    *,
    token_ids: np.ndarray,
    decode: Callable[[Sequence[int]], str],
) -> list[TokenUse]:
    """Tokens that call an expert oftener than chance, by standardised excess over it."""
    held = counts.token_usage[layer_idx, : len(token_ids)]
    met = held.sum(axis=1) / counts.shape.top_k
    used = held[:, expert_idx]
    expected = met * used.sum() / max(met.sum(), 1)
    excess = (used - expected) / np.sqrt(np.maximum(expected, 1e-9))
    excess[used < _MIN_COUNT] = 0
    best = np.argsort(-excess, kind="stable")[:_TOP_TOKENS]
    return [
        TokenUse(
            token_id=int(token_ids[i]),
            text=decode([int(token_ids[i])]),
            count=int(used[i]),
            lift=_round(used[i] / expected[i]),
        )
        for i in best
        if excess[i] > 0
    ]


def _round(value: float | np.floating | np.ndarray) -> float:
    return round(float(value), 5)


def _listed(values: np.ndarray) -> list[float]:
    return [_round(value) for value in values]
