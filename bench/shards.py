"""Safetensors shards written as a stream: sizes are known first, tensors are made one by one.

The format is https://github.com/huggingface/safetensors; the library's own writer wants all tensors
of a file in memory. Knows no model.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..collect.durable import durable_write

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_INDEX_NAME = "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written; `chunks()` makes it, as row blocks one after the other."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    *,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `tensors` in order into shards of at most `max_shard_bytes`, and their index.

    A shard appears under its name only when it is whole. `progress(done_bytes, total_bytes)`.
    """
    shards = _split(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    weight_map: dict[str, str] = {}
    paths = []
    for index, shard in enumerate(shards, start=1):
        path = folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        with durable_write(path) as file:
            file.write(_header(shard))
            for tensor in shard:
                written = 0
                for chunk in tensor.chunks():
                    raw = chunk.contiguous().reshape(-1).view(torch.uint8).numpy()
                    file.write(raw.data)
                    written += raw.nbytes
                if written != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {written} bytes made of {tensor.nbytes}")
                done += written
                if progress is not None:
                    progress(done, total)
        weight_map |= {tensor.name: path.name for tensor in shard}
        paths.append(path)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    with durable_write(folder / _INDEX_NAME) as file:
        file.write(index_text.encode())
    return paths


def _split(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        table[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text
