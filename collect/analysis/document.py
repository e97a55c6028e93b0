"""The form of `expert_analysis.json` and of a comparison: every field, its unit and its range.

Entropies and informations are in bits, shares and rates between 0 and 1. Layers are
Mixture-of-Experts layers counted from 0, experts are ids within their layer.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..durable import durable_write
from ..errors import TraceError
from ..schema import ModelShape
from .clusters import Clustering

ANALYSIS_VERSION = 1
ANALYSIS_NAME = "expert_analysis.json"
MAX_JOINT_EXPERTS = 128


class ExpertPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two experts of a layer: in how many tokens both, and how much oftener than by chance (1)."""

    experts: tuple[int, int]
    count: int
    lift: float


class TokenUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token an expert is chosen for: its text, how often, and how much oftener than by chance
    (1).
    """

    token_id: int
    text: str
    count: int
    lift: float


class TextContext(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place in the text where an expert's weight is among its largest; `token` stands between the
    two.
    """

    weight: float
    dataset: str
    sample_id: int
    before: str
    token: str
    after: str


class ExpertFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One expert. `share` of all tokens use it; `dataset_lift` compares that share between data
    sets.
    """

    layer_idx: int
    expert_idx: int
    share: float
    dataset_lift: dict[str, float]
    top_tokens: list[TokenUse]
    contexts: list[TextContext]


class LayerFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer.

    - `usage` [E]: share of tokens that use each expert; sums to top-k. `coverage`: experts used /
    E. - `routing_entropy`: of the usage distribution, at most log2 E. `router_entropy`: mean
    per-token entropy of the router's probabilities; null where none were recorded. -
    `concentration`: largest over mean use. `gini`: 0 balanced. - `unique_pairs`: distinct unordered
    top-2 pairs. `top_pairs` by count, `top_lifts` by lift, of all pairs within a token's top-k. -
    `dataset_information`, `token_information`: mutual information between a chosen expert and the
    data set, the token id; less the bias of a finite sample. - `previous_overlap`: share of a
    token's experts that the previous token used too; `chance_overlap`: the same if tokens were
    independent. `previous_top1`: the first expert is the previous token's. - `frequency_recall`:
    share found by always naming the k most used; `frequency_top1` likewise for the first expert.
    Both are counted on the same tokens, so they bound what frequency alone can reach. -
    `next_token_entropy`, `next_layer_entropy`: of the next token's, next layer's first expert once
    this one is known; `*_information`: what knowing it tells. The last layer has no next one
    (null). - `reuse_gaps`: share of uses after a gap of 1, 2-3, 4-7, ... tokens; `mean_reuse_gap`
    in tokens. - `lru_hit_rate` [E + 1]: of an LRU cache of this layer alone with 0, 1, ..., E
    slots. - `drift_in_text` [parts of the window], `drift_over_time` [parts of the collection]:
    Jensen-Shannon divergence of usage from the layer's whole.
    """

    layer_idx: int
    usage: list[float]
    coverage: float
    routing_entropy: float
    router_entropy: float | None
    concentration: float
    gini: float
    unique_pairs: int
    top_pairs: list[ExpertPair]
    top_lifts: list[ExpertPair]
    joint: list[list[int]] | None
    dataset_information: float
    token_information: float
    previous_overlap: float
    chance_overlap: float
    previous_top1: float
    frequency_recall: float
    frequency_top1: float
    next_token_entropy: float
    next_token_information: float
    next_layer_entropy: float | None
    next_layer_information: float | None
    mean_reuse_gap: float
    reuse_gaps: list[float]
    lru_hit_rate: list[float]
    drift_in_text: list[float]
    drift_over_time: list[float]
    clusters: list[Clustering]


class DatasetFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data set: coverage and entropy as means over layers, pairs as a sum over layers."""

    traces: int
    tokens: int
    coverage: float
    unique_pairs: int
    routing_entropy: float


class LruCurve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hit rate of ONE least-recently-used cache for all layers at each number of `slots`.

    Counted over `tokens` decode steps, samples one after the other, first uses being misses.
    """

    tokens: int
    slots: list[int]
    hit_rate: list[float]


class OverallFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Means over layers of what LayerFigures says, pairs summed; extremes as (layer, expert,
    share).
    """

    coverage: float
    experts_used: int
    experts_per_layer: float
    unique_pairs: int
    routing_entropy: float
    normalized_entropy: float
    effective_experts: float
    router_entropy: float | None
    concentration: float
    gini: float
    dataset_information: float
    token_information: float
    previous_overlap: float
    chance_overlap: float
    previous_top1: float
    frequency_recall: float
    frequency_top1: float
    next_token_information: float
    next_layer_information: float | None
    mean_reuse_gap: float
    most_used: tuple[int, int, float]
    least_used: tuple[int, int, float]


class Analysis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`expert_analysis.json`. `coverage_over_time`: mean coverage after each part of the
    collection.
    """

    analysis_version: int
    model: str
    format: str
    shape: ModelShape
    traces: int
    tokens: int
    skipped_shards: list[str]
    datasets: dict[str, DatasetFigures]
    overall: OverallFigures
    coverage_over_time: list[float]
    lru: LruCurve
    layers: list[LayerFigures]
    experts: list[ExpertFigures]


def write_analysis(analysis: Analysis, path: Path) -> None:
    """Write the document, whole or not at all. Blocks on fsync."""
    with durable_write(path) as file:
        file.write(msgspec.json.encode(analysis))


def read_analysis(path: Path) -> Analysis:
    """Read what `write_analysis` wrote. TraceError where it is missing or of another form."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Analysis)
    except OSError as error:
        raise TraceError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise TraceError(f"{str(path)!r} is not an expert analysis: {error}") from None
