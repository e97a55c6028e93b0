"""Several models side by side: the same measures, brought to a common scale for the number of
experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from ..durable import durable_write
from ..errors import SettingsError
from .document import Analysis

COMPARISON_NAME = "comparison.json"


class ModelRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model. What depends on the number of experts also stands divided by its possible range.

    - `normalized_entropy`: routing entropy / log2 E. `effective_share`: 2^entropy / E, the share of
    experts that would give this entropy if all were used alike. - `normalized_concentration`: (max
    / mean - 1) / (E / k - 1): 0 balanced, 1 as unequal as can be. - `pair_share`: unique top-2
    pairs / possible pairs. - `*_share` of information: divided by the routing entropy, what knowing
    it explains of the choice. - Bounds, as recall at k: `chance_recall` = k / E, `frequency_recall`
    (always the k most used), `previous_recall` (the previous token's experts). `*_skill`: (recall -
    chance) / (1 - chance). - `lru_hit_rate` at 10, 25 and 50 % of all experts in one cache.
    """

    name: str
    model: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    active_share: float
    tokens: int
    coverage: float
    routing_entropy: float
    normalized_entropy: float
    effective_experts: float
    effective_share: float
    router_entropy: float | None
    concentration: float
    normalized_concentration: float
    gini: float
    unique_pairs: int
    pair_share: float
    dataset_information: float
    dataset_share: float
    token_information: float
    token_share: float
    next_layer_information: float | None
    chance_recall: float
    frequency_recall: float
    frequency_skill: float
    previous_recall: float
    previous_skill: float
    lru_hit_rate: dict[str, float]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`comparison.json`: a row a model, in the order given."""

    rows: list[ModelRow]


def compare(analyses: Mapping[str, Analysis]) -> Comparison:
    """The comparison of analyses by name. SettingsError for fewer than two."""
    if len(analyses) < 2:
        raise SettingsError(f"{len(analyses)} analysis given; a comparison needs two or more")
    return Comparison([_row(name, analysis) for name, analysis in analyses.items()])


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the document, whole or not at all. Blocks on fsync."""
    with durable_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(comparison), indent=2))


def _row(name: str, analysis: Analysis) -> ModelRow:
    shape, overall = analysis.shape, analysis.overall
    experts, top_k = shape.num_experts, shape.top_k
    chance = top_k / experts
    entropy = max(overall.routing_entropy, 1e-9)
    pairs = experts * (experts - 1) / 2 * shape.num_moe_layers

    def skill(recall: float) -> float:
        return round((recall - chance) / (1 - chance), 5) if chance < 1 else 0.0

    return ModelRow(
        name=name,
        model=analysis.model,
        num_moe_layers=shape.num_moe_layers,
        num_experts=experts,
        top_k=top_k,
        active_share=round(chance, 5),
        tokens=analysis.tokens,
        coverage=overall.coverage,
        routing_entropy=overall.routing_entropy,
        normalized_entropy=overall.normalized_entropy,
        effective_experts=overall.effective_experts,
        effective_share=round(overall.effective_experts / experts, 5),
        router_entropy=overall.router_entropy,
        concentration=overall.concentration,
        normalized_concentration=round((overall.concentration - 1) / max(1 / chance - 1, 1e-9), 5),
        gini=overall.gini,
        unique_pairs=overall.unique_pairs,
        pair_share=round(overall.unique_pairs / max(pairs, 1), 5),
        dataset_information=overall.dataset_information,
        dataset_share=round(overall.dataset_information / entropy, 5),
        token_information=overall.token_information,
        token_share=round(overall.token_information / entropy, 5),
        next_layer_information=overall.next_layer_information,
        chance_recall=round(chance, 5),
        frequency_recall=overall.frequency_recall,
        frequency_skill=skill(overall.frequency_recall),
        previous_recall=overall.previous_overlap,
        previous_skill=skill(overall.previous_overlap),
        lru_hit_rate={
            f"{percent}%": _hit_rate(analysis, percent / 100) for percent in (10, 25, 50)
        },
    )


def _hit_rate(analysis: Analysis, share: float) -> float:
    slots = share * analysis.shape.num_routed_experts
    return round(float(np.interp(slots, analysis.lru.slots, analysis.lru.hit_rate)), 5)
