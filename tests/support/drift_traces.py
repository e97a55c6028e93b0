"""Traces of a made-up model whose state drifts linearly from layer to layer: all answers known.

A token's state begins as its embedding plus a share of the token before. Layer l + 1 reads
state @ drift[l] plus noise, and routes by its own gate. Documents have two samples each; document
number mod 10 gives the split: 0 test, 1 validation, the others train.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from outrider.collect.schema import ModelShape
from outrider.collect.trace import Manifest, ShardRows, TraceWriter
from outrider.collect.trace.columns import SPLITS, ids_dtype
from outrider.collect.trace.encoding import safetensors_bytes
from outrider.collect.trace.manifest import DatasetEntry

SHAPE = ModelShape(4, 12, 3, 16, 8, "drift-0")
WINDOW = 12
VOCABULARY = 24
SAMPLES_PER_DOCUMENT = 2


@dataclass(frozen=True)
class Drift:
    """The planted model and all that was recorded of it. Arrays over T tokens."""

    folder: Path
    gates: np.ndarray
    drift: np.ndarray
    document_id: np.ndarray
    split: np.ndarray
    token_id: np.ndarray
    topk_ids: np.ndarray
    hidden: np.ndarray


def split_of_document(number: int) -> int:
    return {0: 2, 1: 1}.get(number % 10, 0)


def write_drift_traces(
    folder: Path,
    *,
    documents: int = 60,
    noise: float = 0.02,
    drift: float = 0.8,
    hidden_layers: tuple[int, ...] = (0, 1, 2, 3),
    shape: ModelShape = SHAPE,
    seed: int = 0,
) -> Drift:
    rng = np.random.default_rng(seed)
    layers, experts, size = shape.num_moe_layers, shape.num_experts, shape.hidden_size
    gates = rng.normal(size=(layers, experts, size)).astype(np.float32)
    turns = np.eye(size) + drift * rng.normal(size=(layers, size, size)) / np.sqrt(size)
    samples = documents * SAMPLES_PER_DOCUMENT
    tokens = samples * WINDOW
    token_id = rng.integers(0, VOCABULARY, tokens)
    embeddings = rng.normal(size=(VOCABULARY, size))
    state = embeddings[token_id] + 0.4 * embeddings[np.roll(token_id, 1)]
    hidden = np.empty((layers, tokens, size), np.float32)
    topk_ids = np.empty((tokens, layers, shape.top_k), np.int64)
    weights = np.empty((tokens, layers, shape.top_k))
    for layer_idx in range(layers):
        if layer_idx:
            state = state @ turns[layer_idx - 1]
            state = state / np.sqrt(np.square(state).mean(axis=1, keepdims=True))
            state = state + noise * rng.normal(size=state.shape)
        hidden[layer_idx] = state
        logits = hidden[layer_idx] @ gates[layer_idx].T
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        order = np.argsort(-logits, axis=1, kind="stable")[:, : shape.top_k]
        topk_ids[:, layer_idx] = order
        weights[:, layer_idx] = np.take_along_axis(share, order, axis=1)
    document = np.repeat(np.arange(documents), SAMPLES_PER_DOCUMENT * WINDOW)
    split = np.array([split_of_document(number) for number in document])
    columns = {
        "document_id": document.astype(np.uint64) + 1000,
        "split": np.array(SPLITS, dtype=object)[split],
        "sample_id": np.repeat(np.arange(samples, dtype=np.uint32), WINDOW),
        "dataset_name": np.full(tokens, "drift", dtype=object),
        "position": np.tile(np.arange(WINDOW, dtype=np.uint16), samples),
        "document_offset": np.zeros(tokens, dtype=np.uint32),
        "token_id": token_id.astype(np.uint32),
        "topk_ids": topk_ids.reshape(tokens, -1).astype(ids_dtype(experts)),
        "topk_weights": weights.reshape(tokens, -1).astype(np.float16),
    }
    states = {number: torch.from_numpy(hidden[number]) for number in hidden_layers}
    with TraceWriter(folder, _manifest(shape, samples, documents, hidden_layers)) as writer:
        tensors = {f"layer_{i}.weight": torch.from_numpy(gates[i]) for i in range(layers)}
        metadata = {"scoring": "softmax", "top_k": str(shape.top_k)}
        writer.write_routers(safetensors_bytes(tensors, metadata))
        writer.write_shard(ShardRows("drift", 0, samples, 4, columns, states))
        writer.finish()
    return Drift(folder, gates, turns, columns["document_id"], split, token_id, topk_ids, hidden)


def _manifest(
    shape: ModelShape, samples: int, documents: int, hidden_layers: tuple[int, ...]
) -> Manifest:
    entry = DatasetEntry("drift", "test:drift", 0, samples, samples * WINDOW, documents, "0")
    return Manifest(
        schema_version=1,
        shape=shape,
        model="drift",
        format="fp32",
        dtype="float32",
        device="cpu",
        tokenizer="",
        context_tokens=WINDOW,
        seed=0,
        batch_size=4,
        threads=1,
        samples_per_shard=samples,
        probabilities="none",
        scoring="softmax",
        hidden_layers=hidden_layers,
        datasets=(entry,),
        software={},
        created="2026-01-01T00:00:00+00:00",
    )
