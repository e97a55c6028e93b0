"""The whole analysis of one model's traces, in one pass over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import TraceError
from ..trace.batch import Selection, TraceBatch
from ..trace.reader import TraceReader
from ..trace.writer import TOKENIZER_NAME
from .clusters import (
    DEFAULT_CLUSTERS,
    Clustering,
    cluster_experts,
    coactivation_features,
    router_features,
    similarity_features,
)
from .contexts import ExpertContexts
from .counts import RoutingCounts
from .document import ANALYSIS_VERSION, Analysis
from .layer import (
    coverage_over_time,
    dataset_figures,
    expert_figures,
    layer_figures,
    lru_curve,
    overall_figures,
)


def analyze(
    readers: Sequence[TraceReader],
    *,
    num_clusters: int = DEFAULT_CLUSTERS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Analyse traces of one model (`open_traces` checks that); blocks for one pass over all rows.

    `num_clusters` 0 leaves the clusters out, and with them scikit-learn. `progress` is told tokens
    done and in all. TraceError where there is no trace at all, CorruptShardError for damage.
    """
    shape = readers[0].shape
    names = list(dict.fromkeys(name for reader in readers for name in reader.dataset_names))
    counts = RoutingCounts(
        shape,
        names,
        window=max(reader.manifest.context_tokens for reader in readers),
        num_samples=sum(reader.manifest.num_samples for reader in readers),
    )
    contexts = ExpertContexts(shape.num_moe_layers, shape.num_experts)
    first, done, tokens = 0, 0, sum(reader.num_tokens for reader in readers)
    for reader in readers:
        for batch in reader.batches(Selection()):
            batch = _renamed(batch, names, first)
            counts.add(batch)
            contexts.add(batch)
            done += len(batch)
            if progress is not None:
                progress(done, tokens)
        first += reader.manifest.num_samples
    if not counts.tokens.sum():
        raise TraceError(f"{str(readers[0].directory)!r} holds no finished trace to analyse")
    layers = [
        layer_figures(
            counts,
            layer_idx,
            _clusters(counts, readers[0], layer_idx, number=num_clusters, seed=seed),
        )
        for layer_idx in range(shape.num_moe_layers)
    ]
    return Analysis(
        analysis_version=ANALYSIS_VERSION,
        model=readers[0].manifest.model,
        format=readers[0].manifest.format,
        shape=shape,
        traces=int(counts.samples.sum()),
        tokens=int(counts.tokens.sum()),
        skipped_shards=[name for reader in readers for name in reader.skipped],
        datasets=dataset_figures(counts),
        overall=overall_figures(counts, layers),
        coverage_over_time=coverage_over_time(counts),
        lru=lru_curve(counts),
        layers=layers,
        experts=expert_figures(counts, contexts, decoder_of(readers[0].directory)),
    )


def decoder_of(directory: Path) -> Callable[[Sequence[int]], str]:
    """Token ids to text by the tokenizer kept beside the traces; to their numbers where there is
    none.
    """
    path = directory / TOKENIZER_NAME
    if not path.exists():
        return lambda ids: " ".join(f"<{token_id}>" for token_id in ids)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def _renamed(batch: TraceBatch, names: Sequence[str], first_sample: int) -> TraceBatch:
    """The batch as part of several folders: data sets by the common list, samples numbered on."""
    if batch.dataset_names == tuple(names) and first_sample == 0:
        return batch
    index = np.array([names.index(name) for name in batch.dataset_names], dtype=np.int16)
    return dataclasses.replace(
        batch,
        dataset_names=tuple(names),
        dataset=index[batch.dataset],
        sample_id=batch.sample_id + np.uint32(first_sample),
    )


def _clusters(
    counts: RoutingCounts, reader: TraceReader, layer_idx: int, *, number: int, seed: int
) -> list[Clustering]:
    if number < 2:
        return []
    experts = counts.shape.num_experts
    try:
        tensors, _ = reader.routers()
    except TraceError:
        tensors = {}
    features = {
        "co-activation": coactivation_features(counts.joint[layer_idx]),
        "router": router_features(tensors, layer_idx, experts),
        "similarity": similarity_features(
            counts.similarity[layer_idx], counts.probability[layer_idx], counts.entropy_tokens
        ),
    }
    found = [
        cluster_experts(rows, source, num_clusters=number, seed=seed)
        for source, rows in features.items()
        if rows is not None
    ]
    return [clustering for clustering in found if clustering is not None]
