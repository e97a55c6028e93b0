"""Traces on disk: what a shard holds, how it is written whole, how it is read back in bounded
memory.
"""

from .batch import Selection, TraceBatch, TraceRecord
from .encoding import EncodedShard, ShardRows, encode_shard
from .manifest import Manifest, ShardEntry, read_manifest
from .reader import TraceReader, open_traces
from .writer import TraceWriter

__all__ = [
    "EncodedShard",
    "Manifest",
    "Selection",
    "ShardEntry",
    "ShardRows",
    "TraceBatch",
    "TraceReader",
    "TraceRecord",
    "TraceWriter",
    "encode_shard",
    "open_traces",
    "read_manifest",
]
