"""One finished shard as a file: opened, checked against the manifest, read a row group at a time.

Every refusal names the file and what is wrong with it. Knows nothing of selections by data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..errors import CorruptShardError
from .batch import NUMBERS, Selection, TraceBatch, sample_offsets, select_rows
from .columns import SCHEMA_VERSION, SPLITS, describe, shard_schema, to_matrix
from .manifest import Manifest, ShardEntry

if TYPE_CHECKING:
    import torch

MAX_ROW_GROUP_BYTES = 1 << 30


def read_shard(
    directory: Path, manifest: Manifest, shard: ShardEntry, *, selection: Selection
) -> Iterator[TraceBatch]:
    """The selected rows of one shard, a batch a row group. CorruptShardError naming the file."""
    columns = [*NUMBERS, "split", "topk_ids"]
    if selection.weights:
        columns.append("topk_weights")
    if selection.log_probs and manifest.probabilities != "none":
        columns.append("router_log_probs")
    with ExitStack() as stack:
        file = stack.enter_context(_open(directory, manifest, shard))
        hidden = _Hidden(
            directory, shard, selection.hidden_layers, manifest.shape.hidden_size, stack
        )
        first_row = 0
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise damaged(directory / shard.file, f"row group {group}: {error}") from None
            batch = _batch(table, directory, manifest, shard=shard, selection=selection)
            states = hidden.rows(first_row, first_row + table.num_rows)
            first_row += table.num_rows
            batch = select_rows(batch, states, selection)
            if len(batch):
                yield batch


def verify_shard(directory: Path, shard: ShardEntry) -> None:
    """Compare the shard's files with their checksums; reads all bytes. CorruptShardError."""
    for name, checksum in ((shard.file, shard.checksum), (shard.hidden, shard.hidden_checksum)):
        if name is None:
            continue
        try:
            digest = _file_digest(directory / name)
        except OSError as error:
            raise damaged(directory / name, f"it cannot be read ({error.strerror})") from None
        if digest != checksum:
            raise damaged(
                directory / name, f"its checksum is {digest}, the manifest says {checksum}"
            )


def damaged(path: Path, reason: str) -> CorruptShardError:
    """The error for one bad file."""
    return CorruptShardError(
        f"{str(path)!r} is damaged: {' '.join(reason.split())}; "
        "collect it again, or leave it out with --skip-bad"
    )


class _Hidden:
    """The hidden states beside a shard, sliced row by row so that memory stays bounded."""

    def __init__(
        self,
        directory: Path,
        shard: ShardEntry,
        layers: Sequence[int],
        hidden_size: int,
        stack: ExitStack,
    ) -> None:
        self._slices: dict[int, Any] = {}
        if not layers:
            return
        from safetensors import SafetensorError, safe_open

        path = directory / (shard.hidden or f"hidden/{Path(shard.file).stem}.safetensors")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for layer_idx in layers:
                self._slices[layer_idx] = file.get_slice(f"layer_{layer_idx}")
        except (OSError, SafetensorError) as error:
            raise damaged(path, str(error)) from None
        for layer_idx, rows in self._slices.items():
            if tuple(rows.get_shape()) != (shard.num_tokens, hidden_size):
                raise damaged(path, f"layer_{layer_idx} has shape {tuple(rows.get_shape())}")

    def rows(self, start: int, end: int) -> dict[int, torch.Tensor]:
        return {layer_idx: rows[start:end] for layer_idx, rows in self._slices.items()}


def _open(directory: Path, manifest: Manifest, shard: ShardEntry) -> pq.ParquetFile:
    path = directory / shard.file
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise damaged(path, "it is not there") from None
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, str(error)) from None
    problem = _problem(file, manifest, shard)
    if problem:
        file.close()
        raise damaged(path, problem)
    return file


def _problem(file: pq.ParquetFile, manifest: Manifest, shard: ShardEntry) -> str | None:
    described = describe(file.schema_arrow)
    if not described:
        return "it is not a trace shard (no description of its schema)"
    if described.get("schema_version") != SCHEMA_VERSION:
        return f"schema version {described.get('schema_version')}, expected {SCHEMA_VERSION}"
    expected = shard_schema(manifest.shape, manifest.probabilities)
    if described != describe(expected):
        return f"it describes {described}, the manifest {describe(expected)}"
    for name in expected.names:
        index = file.schema_arrow.get_field_index(name)
        if index < 0:
            return f"column {name!r} is missing"
        found, wanted = file.schema_arrow.field(index).type, expected.field(name).type
        if found != wanted:
            return f"column {name!r} is {found}, expected {wanted}"
    if file.metadata.num_rows != shard.num_tokens:
        return f"it has {file.metadata.num_rows} rows, the manifest says {shard.num_tokens}"
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        if size > MAX_ROW_GROUP_BYTES:
            return f"row group {group} takes {size:,} bytes, more than {MAX_ROW_GROUP_BYTES:,}"
    return None


def _batch(
    table: pa.Table, directory: Path, manifest: Manifest, *, shard: ShardEntry, selection: Selection
) -> TraceBatch:
    values: dict[str, Any] = {name: table[name].to_numpy() for name in NUMBERS}
    shape = manifest.shape
    layers = tuple(range(shape.num_moe_layers) if selection.layers is None else selection.layers)
    wanted = slice(None) if selection.layers is None else list(layers)

    def per_layer(name: str, width: int) -> Any:
        if name not in table.column_names:
            return None
        return to_matrix(table[name]).reshape(-1, shape.num_moe_layers, width)[:, wanted]

    topk_ids = per_layer("topk_ids", shape.top_k)
    if topk_ids.size and int(topk_ids.max()) >= shape.num_experts:
        raise damaged(directory / shard.file, f"expert {topk_ids.max()} of {shape.num_experts}")
    dataset_names = tuple(dataset.name for dataset in manifest.datasets)
    dataset = dataset_names.index(shard.dataset)
    return TraceBatch(
        layers=layers,
        dataset_names=dataset_names,
        sample_offsets=sample_offsets(values["sample_id"]),
        dataset=np.full(table.num_rows, dataset, dtype=np.int16),
        split=_splits(table["split"], directory / shard.file),
        topk_ids=topk_ids,
        topk_weights=per_layer("topk_weights", shape.top_k),
        coded_log_probs=per_layer("router_log_probs", shape.num_experts),
        **values,
    )


def _splits(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    encoded = pa.concat_arrays(column.chunks).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if not set(names) <= set(SPLITS):
        raise damaged(path, f"splits {names}, expected {', '.join(SPLITS)}")
    codes = np.array([SPLITS.index(name) for name in names], dtype=np.uint8)
    return codes[encoded.indices.to_numpy()]


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
