"""A shard's rows as the bytes of its files: the same arrays give the same bytes, wherever they are
made.

Knows no folder; `writer` puts the bytes into one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import xxhash

from .columns import encodings, shard_schema, to_table
from .manifest import Manifest, ShardEntry

if TYPE_CHECKING:
    import torch

SHARDS, HIDDEN = "shards", "hidden"
_ROW_GROUP_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The rows of one shard, in sample order.

    `columns` has an array for every column of the schema, [rows] or [rows, width]; `hidden` maps a
    Mixture-of-Experts layer to its router inputs [rows, H] on the CPU.
    """

    dataset: str
    first_sample: int
    num_samples: int
    batch_size: int
    columns: Mapping[str, np.ndarray]
    hidden: Mapping[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """A shard that only needs to be written: its manifest entry, its Parquet file, its hidden
    states (empty where none are kept).
    """

    entry: ShardEntry
    rows: bytes
    hidden: bytes


def encode_shard(rows: ShardRows, manifest: Manifest) -> EncodedShard:
    """The files of one shard of the collection that `manifest` describes.

    They are named by the first sample, so that who makes a shard, and when, does not show.
    """
    stem = f"{rows.first_sample:08d}-{_safe(rows.dataset)}"
    hidden = b""
    if rows.hidden:
        named = {f"layer_{layer_idx}": states for layer_idx, states in rows.hidden.items()}
        hidden = safetensors_bytes(named, {"first_sample": str(rows.first_sample)})
    schema = shard_schema(manifest.shape, manifest.probabilities)
    table = to_table(rows.columns, schema)
    file = io.BytesIO()
    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=1,
        write_page_checksum=True,
        **encodings(schema),
    ) as parquet:
        for start, end in _row_groups(rows.columns["sample_id"]):
            parquet.write_table(table.slice(start, end - start), row_group_size=end - start)
    written = file.getvalue()
    entry = ShardEntry(
        file=f"{SHARDS}/{stem}.parquet",
        dataset=rows.dataset,
        first_sample=rows.first_sample,
        num_samples=rows.num_samples,
        num_tokens=table.num_rows,
        batch_size=rows.batch_size,
        nbytes=len(written),
        checksum=xxhash.xxh3_64_hexdigest(written),
        hidden=f"{HIDDEN}/{stem}.safetensors" if hidden else None,
        hidden_nbytes=len(hidden),
        hidden_checksum=xxhash.xxh3_64_hexdigest(hidden) if hidden else "",
    )
    return EncodedShard(entry, written, hidden)


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as a safetensors file."""
    # Imported here: it pulls in torch, which a reader of rows alone does not need.
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))


def _row_groups(sample_ids: np.ndarray) -> Sequence[tuple[int, int]]:
    """Row ranges of at most about `_ROW_GROUP_TOKENS`, cut only between samples."""
    starts = np.flatnonzero(np.diff(sample_ids.astype(np.int64), prepend=-1))
    cuts, begin = [], 0
    for start, end in zip(starts, [*starts[1:], len(sample_ids)], strict=True):
        if end - begin > _ROW_GROUP_TOKENS and start > begin:
            cuts.append((begin, int(start)))
            begin = int(start)
    return [*cuts, (begin, len(sample_ids))]


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:40]
