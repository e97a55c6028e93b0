"""Traces as arrays that predictors are fitted to and judged on: one split, whole samples in order.

Knows the reader of traces, no family and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..collect.errors import TraceError
from ..collect.schema import ModelShape
from ..collect.trace import Selection, TraceReader
from .errors import TrainingDataError

if TYPE_CHECKING:
    import torch

    from .lookahead import Gate

_MAX_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokens of one split of the traces of one model: T tokens in S samples.

    `token_id` [T] int32; `topk_ids` [T, L, k] by weight descending, `topk_weights` [T, L, k]
    float16; `sample_offsets` [S + 1] row ranges: the tokens of a sample follow each other, and
    nothing follows across samples. `document_id` [T] uint64 (in many datasets a document has
    several samples). `hidden` maps a layer to its router inputs [T, hidden_size], float16 or
    float32. `log_probs` [T, L, E] float16 natural logarithms. `gates` are the routers' own
    weights [E, H] and selection biases, `scoring` as LookaheadPredictor takes it. `sources` are
    what a checkpoint keeps of the traces' identity.
    """

    shape: ModelShape
    split: str
    token_id: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    sample_offsets: np.ndarray
    document_id: np.ndarray
    hidden: Mapping[int, np.ndarray] = field(default_factory=dict)
    log_probs: np.ndarray | None = None
    gates: tuple[Gate, ...] | None = None
    scoring: str = "softmax"
    sources: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        readers: Sequence[TraceReader],
        split: str,
        *,
        hidden_layers: Sequence[int] = (),
        log_probs: bool = False,
        max_tokens: int | None = None,
    ) -> Examples:
        """The rows of `split` ("train", "validation" or "test") from folders of one model.

        About `max_tokens` in whole samples, spread evenly over the traces; None reads all. Blocks
        on the disk. Raises TraceError, or TrainingDataError where hidden states or rows are
        missing.
        """
        shape = readers[0].shape
        for reader in readers:
            missing = sorted(set(hidden_layers) - set(reader.manifest.hidden_layers))
            if missing:
                recorded = list(reader.manifest.hidden_layers)
                raise TrainingDataError(
                    f"{str(reader.directory)!r} has no hidden states of layers {missing} "
                    f"(recorded: {recorded or 'none'}); collect with --hidden-states ensemble or "
                    "all, or train with --features routing"
                )
        share = 1.0 if max_tokens is None else max_tokens / max(1, _num_tokens(readers, split))
        selection = Selection(
            splits=(split,), hidden_layers=hidden_layers, log_probs=log_probs, share=share
        )
        batches = [batch for reader in readers for batch in reader.batches(selection)]
        if not batches:
            folders = ", ".join(repr(str(reader.directory)) for reader in readers)
            raise TrainingDataError(
                f"no {split} samples in {folders}; collect more traces (a document in a hundred "
                "is enough of a split only if there are hundreds of documents)"
            )
        gates, scoring = _gates(readers[0])
        starts = np.cumsum([0, *(len(batch) for batch in batches)])
        num_tokens = int(starts[-1])
        offsets = [
            batch.sample_offsets[:-1] + start for batch, start in zip(batches, starts, strict=False)
        ]
        return cls(
            shape=shape,
            split=split,
            token_id=np.concatenate([batch.token_id for batch in batches]).astype(np.int32),
            topk_ids=np.concatenate([batch.topk_ids for batch in batches]),
            topk_weights=np.concatenate(
                [np.asarray(batch.topk_weights, np.float16) for batch in batches]
            ),
            sample_offsets=np.append(np.concatenate(offsets), num_tokens).astype(np.int64),
            document_id=np.concatenate([batch.document_id for batch in batches]),
            hidden={
                layer_idx: _joined([batch.hidden[layer_idx] for batch in batches])
                for layer_idx in hidden_layers
            },
            log_probs=np.concatenate([batch.log_probs().astype(np.float16) for batch in batches])
            if log_probs
            else None,
            gates=gates,
            scoring=scoring,
            sources=tuple(_identity(reader) for reader in readers),
        )

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def position(self) -> np.ndarray:
        """[T] int64: each token's place in its sample, from 0."""
        return np.arange(len(self)) - np.repeat(self.sample_offsets[:-1], self._lengths)

    @property
    def remaining(self) -> np.ndarray:
        """[T] int64: how many tokens of the same sample come after each token."""
        return np.repeat(self.sample_offsets[1:], self._lengths) - np.arange(len(self)) - 1

    @property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.sample_offsets)

    def rows(self, horizon: int = 1) -> np.ndarray:
        """Rows t [N] at which a token has a predecessor and its `horizon`'s target is known.

        The target of row t is row t + horizon - 1: horizon 1 speaks of the token whose id is known.
        """
        usable = (self.position >= 1) & (self.remaining >= horizon - 1)
        return np.flatnonzero(usable)

    def membership(self, rows: np.ndarray) -> np.ndarray:
        """[N, L, E] bool: which experts the tokens of `rows` used."""
        ids = self.topk_ids[rows].astype(np.int64)
        used = np.zeros((*ids.shape[:2], self.shape.num_experts), bool)
        np.put_along_axis(used, ids, True, axis=2)
        return used

    def cells(self, rows: np.ndarray) -> np.ndarray:
        """[N, L * k] int64: the experts the tokens of `rows` used, numbered over all layers."""
        shape = self.shape
        layers = np.arange(shape.num_moe_layers)[:, None] * shape.num_experts
        return (self.topk_ids[rows].astype(np.int64) + layers).reshape(len(rows), -1)

    def frequencies(self) -> np.ndarray:
        """[L, E] float32: the share of tokens that used each expert."""
        shape = self.shape
        cells = self.cells(np.arange(len(self)))
        counts = np.bincount(cells.ravel(), minlength=shape.num_routed_experts)
        return (counts.reshape(shape.num_moe_layers, -1) / max(len(self), 1)).astype(np.float32)

    def samples(self, first: int, last: int) -> Examples:
        """Samples `first` to `last` - 1 as examples of their own; arrays are views."""
        start, end = int(self.sample_offsets[first]), int(self.sample_offsets[last])
        return Examples(
            shape=self.shape,
            split=self.split,
            token_id=self.token_id[start:end],
            topk_ids=self.topk_ids[start:end],
            topk_weights=self.topk_weights[start:end],
            sample_offsets=self.sample_offsets[first : last + 1] - start,
            document_id=self.document_id[start:end],
            hidden={layer_idx: states[start:end] for layer_idx, states in self.hidden.items()},
            log_probs=None if self.log_probs is None else self.log_probs[start:end],
            gates=self.gates,
            scoring=self.scoring,
            sources=self.sources,
        )


def _num_tokens(readers: Sequence[TraceReader], split: str) -> int:
    selection = Selection(splits=(split,), weights=False, log_probs=False)
    return sum(len(batch) for reader in readers for batch in reader.batches(selection))


def _joined(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """Router inputs as float16 where that loses nothing to speak of, else float32."""
    largest = max(float(part.abs().max()) for part in parts)
    is_half = parts[0].element_size() == 2 and largest < _MAX_HALF
    return np.concatenate([(part.half() if is_half else part.float()).numpy() for part in parts])


def _gates(reader: TraceReader) -> tuple[tuple[Gate, ...] | None, str]:
    try:
        tensors, metadata = reader.routers()
    except TraceError:
        # Traces of routers that are no plain gates come without the file.
        return None, "softmax"
    gates = []
    for layer_idx in range(reader.shape.num_moe_layers):
        prefix = f"layer_{layer_idx}"
        weight = tensors.get(f"{prefix}.weight")
        if weight is None:
            return None, "softmax"
        bias = tensors.get(f"{prefix}.bias", tensors.get(f"{prefix}.e_score_correction_bias"))
        gates.append((weight, bias))
    is_sigmoid = metadata.get("scoring") == "sigmoid"
    return tuple(gates), "sigmoid" if is_sigmoid else "softmax"


def _identity(reader: TraceReader) -> str:
    """Names a trace folder by what is in it, so that a moved folder stays the same."""
    digests = ",".join(f"{entry.name}:{entry.digest}" for entry in reader.manifest.datasets)
    return f"{reader.shape.fingerprint[:16]} {reader.num_samples} samples {digests}"
