"""Writes traces from plain arrays, so that what a reader or an analysis must find is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from outrider.collect.schema import ModelShape
from outrider.collect.trace import Manifest, ShardRows, TraceWriter
from outrider.collect.trace.columns import SPLITS, ids_dtype
from outrider.collect.trace.manifest import DatasetEntry
from outrider.collect.trace.probability import encode_log8


def shape(layers: int = 2, experts: int = 8, top_k: int = 2, hidden: int = 4) -> ModelShape:
    return ModelShape(layers, experts, top_k, hidden, 4, "planted")


def manifest(
    model_shape: ModelShape,
    datasets: dict[str, int],
    *,
    window: int,
    probabilities: str = "log8",
    hidden_layers: tuple[int, ...] = (),
    **changes: object,
) -> Manifest:
    entries, first = [], 0
    for name, samples in datasets.items():
        entries.append(DatasetEntry(name, f"test:{name}", first, samples, samples * window, 1, "0"))
        first += samples
    values: dict[str, object] = {
        "schema_version": 1,
        "shape": model_shape,
        "model": "planted",
        "format": "fp32",
        "dtype": "float32",
        "device": "cpu",
        "tokenizer": "",
        "context_tokens": window,
        "seed": 0,
        "batch_size": 4,
        "threads": 1,
        "samples_per_shard": 8,
        "probabilities": probabilities,
        "scoring": "softmax",
        "hidden_layers": hidden_layers,
        "datasets": tuple(entries),
        "software": {},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Manifest(**(values | changes))  # type: ignore[arg-type]


def columns(
    model_shape: ModelShape,
    topk_ids: np.ndarray,
    *,
    first_sample: int,
    window: int,
    dataset: str,
    topk_weights: np.ndarray | None = None,
    log_probs: np.ndarray | None = None,
    token_id: np.ndarray | None = None,
    split: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Columns of whole windows: `topk_ids` [T, L, k], T a multiple of `window`."""
    rows = len(topk_ids)
    samples = rows // window
    if topk_weights is None:
        falling = np.linspace(0.5, 0.1, model_shape.top_k, dtype=np.float16)
        topk_weights = np.broadcast_to(falling, topk_ids.shape)
    found = {
        "document_id": np.repeat(np.arange(samples, dtype=np.uint64) + first_sample, window),
        "split": np.array(SPLITS, dtype=object)[np.zeros(rows, int) if split is None else split],
        "sample_id": np.repeat(np.arange(samples, dtype=np.uint32) + first_sample, window),
        "dataset_name": np.full(rows, dataset, dtype=object),
        "position": np.tile(np.arange(window, dtype=np.uint16), samples),
        "document_offset": np.zeros(rows, dtype=np.uint32),
        "token_id": (np.zeros(rows) if token_id is None else token_id).astype(np.uint32),
        "topk_ids": topk_ids.reshape(rows, -1).astype(ids_dtype(model_shape.num_experts)),
        "topk_weights": topk_weights.reshape(rows, -1).astype(np.float16),
    }
    if log_probs is not None:
        coded = encode_log8(torch.from_numpy(np.ascontiguousarray(log_probs)))
        found["router_log_probs"] = coded.reshape(rows, -1).numpy()
    return found


def write(
    directory: Path,
    model_shape: ModelShape,
    parts: dict[str, dict[str, np.ndarray]],
    *,
    window: int,
    shard_samples: int = 10**9,
) -> Path:
    """A complete trace folder; `parts` maps a data set to the keyword arrays of `columns`."""
    sizes = {name: len(part["topk_ids"]) // window for name, part in parts.items()}
    with_probabilities = all("log_probs" in part for part in parts.values())
    described = manifest(
        model_shape, sizes, window=window, probabilities="log8" if with_probabilities else "none"
    )
    first = 0
    with TraceWriter(directory, described) as writer:
        for name, part in parts.items():
            for start in range(0, sizes[name], shard_samples):
                end = min(start + shard_samples, sizes[name])
                rows = slice(start * window, end * window)
                cut = {key: values[rows] for key, values in part.items()}
                writer.write_shard(
                    ShardRows(
                        dataset=name,
                        first_sample=first + start,
                        num_samples=end - start,
                        batch_size=4,
                        columns=columns(
                            model_shape,
                            first_sample=first + start,
                            window=window,
                            dataset=name,
                            **cut,
                        ),
                        hidden={},
                    )
                )
            first += sizes[name]
        writer.finish()
    return directory
