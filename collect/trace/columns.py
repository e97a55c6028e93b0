"""The columns of a trace shard: names, types and how arrays become an Arrow table. Knows no files.

One row a token. Lists have a fixed length: `topk_ids` and `topk_weights` are [L, k] flattened,
`router_log_probs` is [L, E] flattened, `document_offset` the character at which the sample begins;
L the Mixture-of-Experts layers in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..schema import ModelShape

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
Probabilities = Literal["log8", "fp16", "none"]
PROBABILITIES: tuple[Probabilities, ...] = ("log8", "fp16", "none")
_METADATA_KEY = b"outrider"


def ids_dtype(num_experts: int) -> np.dtype:
    """The narrowest unsigned type that holds an expert id."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def shard_schema(shape: ModelShape, probabilities: Probabilities) -> pa.Schema:
    """The Arrow schema of every shard of one collection; its metadata lets a lone shard be
    understood.
    """
    cells = shape.num_moe_layers * shape.top_k
    fields = [
        pa.field("document_id", pa.uint64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("sample_id", pa.uint32(), nullable=False),
        pa.field("dataset_name", pa.string(), nullable=False),
        pa.field("position", pa.uint16(), nullable=False),
        pa.field("document_offset", pa.uint32(), nullable=False),
        pa.field("token_id", pa.uint32(), nullable=False),
        pa.field("topk_ids", _fixed_list(ids_dtype(shape.num_experts), cells), nullable=False),
        pa.field("topk_weights", _fixed_list(np.dtype(np.float16), cells), nullable=False),
    ]
    if probabilities != "none":
        cell = np.dtype(np.uint8 if probabilities == "log8" else np.float16)
        width = shape.num_moe_layers * shape.num_experts
        fields.append(pa.field("router_log_probs", _fixed_list(cell, width), nullable=False))
    described = {
        "schema_version": SCHEMA_VERSION,
        "num_moe_layers": shape.num_moe_layers,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "fingerprint": shape.fingerprint,
        "router_log_probs": probabilities,
    }
    return pa.schema(
        fields, metadata={_METADATA_KEY: json.dumps(described, sort_keys=True).encode()}
    )


def describe(schema: pa.Schema) -> dict[str, Any]:
    """What `shard_schema` wrote beside the columns; empty where the file is not a trace shard."""
    metadata = schema.metadata or {}
    try:
        described = json.loads(metadata.get(_METADATA_KEY, b"{}"))
    except ValueError:
        return {}
    return described if isinstance(described, dict) else {}


def to_table(columns: Mapping[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    """Arrays of one length, 2-D ones as fixed-size lists, as an Arrow table of `schema`; copies
    nothing.

    Raises ValueError where a column is missing or does not have the schema's type or width.
    """
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            width = field.type.list_size
            if values.ndim != 2 or values.shape[1] != width:
                raise ValueError(
                    f"column {field.name!r} has shape {values.shape}, not [rows, {width}]"
                )
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            array = pa.FixedSizeListArray.from_arrays(flat, width).cast(field.type)
        else:
            array = pa.array(values, type=field.type)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def encodings(schema: pa.Schema) -> dict[str, Any]:
    """Parquet's encodings for `ParquetWriter`: dictionaries, but for the long lists of small
    integers.

    Parquet keeps those as 32-bit integers. Split into byte streams they pack a fifth smaller and
    are written faster than by dictionary. Not for fp16: DuckDB cannot read it split.
    """
    dictionary, split = [], {}
    for field in schema:
        is_list = pa.types.is_fixed_size_list(field.type)
        name = f"{field.name}.list.element" if is_list else field.name
        if is_list and pa.types.is_integer(field.type.value_type):
            split[name] = "BYTE_STREAM_SPLIT"
        else:
            dictionary.append(name)
    return {"use_dictionary": dictionary, "column_encoding": split}


def to_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A fixed-size-list column as [rows, width]; a view where the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _fixed_list(dtype: np.dtype, width: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), nullable=False), width)
