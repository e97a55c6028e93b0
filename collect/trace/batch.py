"""What a reader hands out: selections, batches of whole samples, per-layer records. Knows
no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TraceError
from .columns import SPLITS
from .probability import decode_log8

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows, layers and columns to read; None means all of them.

    `hidden_layers` are the layers whose router inputs are wanted; `weights` and `log_probs` false
    leave those columns on the disk. `share` keeps that share of the samples, spread evenly over the
    order of collection and so over data sets and splits.
    """

    datasets: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    hidden_layers: Sequence[int] = ()
    weights: bool = True
    log_probs: bool = True
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """Whole samples in order: T tokens, S samples, L selected layers (`layers` names them).

    Arrays may be read-only views of the file's buffers. `dataset` indexes `dataset_names`, `split`
    indexes SPLITS; `sample_offsets` [S + 1] are row ranges. `topk_ids` and `topk_weights` [T, L, k]
    are ordered by weight. `hidden` maps a layer to its router inputs [T, H] in the model's dtype.
    """

    layers: tuple[int, ...]
    dataset_names: tuple[str, ...]
    sample_offsets: np.ndarray
    document_id: np.ndarray
    dataset: np.ndarray
    split: np.ndarray
    sample_id: np.ndarray
    position: np.ndarray
    document_offset: np.ndarray
    token_id: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray | None
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)
    coded_log_probs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def num_samples(self) -> int:
        """Samples in this batch."""
        return len(self.sample_offsets) - 1

    def log_probs(self) -> np.ndarray:
        """Natural log-probabilities of the routers, float32 [T, L, E]. TraceError where none are
        there.
        """
        if self.coded_log_probs is None:
            raise TraceError(
                "these traces were recorded or selected without router log-probabilities"
            )
        if self.coded_log_probs.dtype == np.uint8:
            return decode_log8(self.coded_log_probs)
        return self.coded_log_probs.astype(np.float32)


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One sample in one layer: `target_routing` [T, E] probabilities, `target_top_k` [T, k] by
    weight.
    """

    layer_id: int
    hidden_states: torch.Tensor | None
    target_routing: np.ndarray | None
    target_top_k: np.ndarray
    token_ids: np.ndarray
    dataset_name: str
    sample_id: int


def select_rows(
    batch: TraceBatch, hidden: Mapping[int, torch.Tensor], selection: Selection
) -> TraceBatch:
    """The rows of the wanted splits and share, with the hidden states of the same rows; no copy
    where all stay.
    """
    mask = np.ones(len(batch), bool)
    if selection.splits is not None:
        mask &= np.isin(batch.split, [SPLITS.index(name) for name in selection.splits])
    if selection.share < 1.0:
        before, after = (np.floor((batch.sample_id + one) * selection.share) for one in (0.0, 1.0))
        mask &= after > before
    keep: Any = slice(None) if mask.all() else np.flatnonzero(mask)
    values = {
        name: getattr(batch, name)[keep] for name in (*NUMBERS, "dataset", "split", "topk_ids")
    }
    for name in ("topk_weights", "coded_log_probs"):
        array = getattr(batch, name)
        values[name] = None if array is None else array[keep]
    return TraceBatch(
        layers=batch.layers,
        dataset_names=batch.dataset_names,
        sample_offsets=sample_offsets(values["sample_id"]),
        hidden={layer_idx: tensor[keep] for layer_idx, tensor in hidden.items()},
        **values,
    )


def sample_offsets(sample_id: np.ndarray) -> np.ndarray:
    """Row ranges [S + 1] of the samples in a run of sample ids."""
    starts = np.flatnonzero(np.diff(sample_id.astype(np.int64), prepend=-1))
    return np.append(starts, len(sample_id))


NUMBERS = ("document_id", "sample_id", "position", "document_offset", "token_id")
