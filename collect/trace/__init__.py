"""Traces on disk: what a shard holds, how it is written whole, how it is read back in bounded
memory.
"""

from .batch import Selection, TraceBatch, TraceRecord
from .manifest import Manifest, ShardEntry, read_manifest
from .reader import TraceReader, open_traces
from .writer import ShardRows, TraceWriter

__all__ = [
    "Manifest",
    "Selection",
    "ShardEntry",
    "ShardRows",
    "TraceBatch",
    "TraceReader",
    "TraceRecord",
    "TraceWriter",
    "open_traces",
    "read_manifest",
]
