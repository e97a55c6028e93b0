"""A folder of safetensors shards: where every tensor lies, what it is, and reading one of them.

Headers are read and checked once; tensors are read with `pread`, never mapped, so a file that is
truncated or replaced under a running process is an error of one read and not a SIGBUS. Knows
nothing of models, families or experts.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import torch
import xxhash

from ..errors import InvalidDataError, UnsupportedModelError

# https://github.com/huggingface/safetensors: 8 bytes little-endian length, then a JSON header.
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
# Fields that differ between two copies of the same weights and do not change what they compute.
_VOLATILE_CONFIG_FIELDS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map", "use_cache"}
)


class _ShardIndex(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of a shard: `offset` and `nbytes` are bytes from the start of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a local model folder. Opening reads the headers only; blocks on the disk.

    `config` is config.json as it stands there.
    Raises InvalidDataError where the folder, a shard or a header is missing or damaged, and
    UnsupportedModelError for pickled or GGUF weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise InvalidDataError(f"{folder} is not a folder; give the folder that it lies in")
        if not folder.is_dir():
            raise InvalidDataError(
                f"model folder {str(folder)!r} does not exist; give a folder with config.json and "
                "*.safetensors, or a hub id such as deepseek-ai/deepseek-moe-16b-base"
            )
        if not (folder / "config.json").is_file():
            raise InvalidDataError(f"{folder}: no config.json, so this is not a model folder")
        self.config = read_object(folder / "config.json")
        self._shards = _find_shards(folder)
        owners = {name: shard for shard, names in self._shards.items() for name in names}
        self.tensors: dict[str, TensorRecord] = {}
        for shard, names in self._shards.items():
            found = {record.name: record for record in _read_header(shard)}
            absent = sorted(names - found.keys())
            if absent:
                raise InvalidDataError(
                    f"{shard}: tensor {absent[0]!r} is named in {_INDEX_NAME} but not in the shard "
                    f"({len(absent)} such); the download is incomplete or mixed up"
                )
            # Another shard may hold a name as well: the index says whose it is.
            self.tensors |= {
                name: record for name, record in found.items() if owners.get(name, shard) == shard
            }

    @property
    def files(self) -> list[Path]:
        """The shards, by name."""
        return sorted(self._shards)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, in the checkpoint's dtype. Blocks on the disk.

        Raises InvalidDataError naming file and tensor if the bytes are not there.
        """
        record = self.tensors[name]
        buffer = torch.empty(record.nbytes, dtype=torch.uint8)
        _read_exactly(record, buffer.numpy().data)
        return buffer.view(record.dtype).reshape(record.shape)


def read_object(path: Path) -> dict:
    """A file's JSON object. InvalidDataError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidDataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidDataError(f"{path} is not a JSON object but a {type(value).__name__}")
    return value


def fingerprint(config: Mapping, checksums: Mapping[str, int]) -> str:
    """Identity of a model's routing: sha256 over its config and per-tensor xxh3-64, as hex.

    Volatile config fields (paths, versions, dtype of the copy) are left out.
    """
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name in sorted(checksums):
        digest.update(f"\n{name}:{checksums[name]:016x}".encode())
    return digest.hexdigest()


def checksum(tensor: torch.Tensor) -> int:
    """xxh3-64 of a contiguous CPU tensor's bytes."""
    return xxhash.xxh3_64_intdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _find_shards(folder: Path) -> dict[Path, set[str]]:
    index_path = folder / _INDEX_NAME
    if index_path.is_file():
        try:
            weight_map = msgspec.json.decode(index_path.read_bytes(), type=_ShardIndex).weight_map
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise InvalidDataError(f"{index_path}: not a shard index: {error}") from error
        if not weight_map:
            raise InvalidDataError(f"{index_path}: names no shard")
        shards: dict[Path, set[str]] = {}
        for tensor, file_name in weight_map.items():
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise InvalidDataError(
                    f"{index_path}: shard name {file_name!r} of tensor {tensor!r} is not a plain "
                    "*.safetensors file name in the same folder"
                )
            shards.setdefault(folder / file_name, set()).add(tensor)
        for shard, names in shards.items():
            if not shard.is_file():
                raise InvalidDataError(
                    f"{shard}: shard is missing ({len(names)} tensors, first {min(names)!r}); "
                    "download the model again or complete the folder"
                )
        return shards
    if (folder / _SINGLE_NAME).is_file():
        return {folder / _SINGLE_NAME: set()}
    return _refuse_other_formats(folder)


def _refuse_other_formats(folder: Path) -> dict[Path, set[str]]:
    if any(folder.glob("*.gguf")):
        raise UnsupportedModelError(
            f"{folder}: GGUF weights are not supported; use the model's safetensors checkpoint"
        )
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise UnsupportedModelError(
            f"{folder}: only pickled weights ({pickled[0].name}), which can run code when opened; "
            "outrider reads safetensors only. Convert them with a tool you trust, or use a "
            "revision of the model that has *.safetensors"
        )
    raise InvalidDataError(f"{folder}: neither {_SINGLE_NAME} nor {_INDEX_NAME} is there")


def _read_header(shard: Path) -> list[TensorRecord]:
    with shard.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_HEADER_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        room = size - _HEADER_LENGTH_BYTES
        if len(prefix) < _HEADER_LENGTH_BYTES or length > min(room, _MAX_HEADER_BYTES):
            raise InvalidDataError(
                f"{shard}: not a safetensors file: header of {length} bytes in a file of {size}"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{shard}: damaged safetensors header: {error}") from error
    entries.pop("__metadata__", None)
    data_start = _HEADER_LENGTH_BYTES + length
    records = [
        _record(shard, name, entry, data_start=data_start, file_size=size)
        for name, entry in entries.items()
    ]
    by_offset = sorted((record for record in records if record.nbytes), key=lambda one: one.offset)
    for before, after in pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise InvalidDataError(
                f"{shard}: tensors {before.name!r} and {after.name!r} overlap; the header lies"
            )
    return records


def _record(
    shard: Path, name: str, entry: dict, *, data_start: int, file_size: int
) -> TensorRecord:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = tuple(_natural(size) for size in entry["shape"])
        begin, end = (_natural(offset) for offset in entry["data_offsets"])
    except KeyError as error:
        raise InvalidDataError(f"{shard}: tensor {name!r}: unknown or missing {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidDataError(f"{shard}: tensor {name!r}: damaged entry: {error}") from error
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if end - begin != expected:
        raise InvalidDataError(
            f"{shard}: tensor {name!r}: {end - begin} bytes for shape {list(shape)} of {dtype}, "
            f"which takes {expected}"
        )
    if data_start + end > file_size:
        raise InvalidDataError(
            f"{shard}: tensor {name!r} ends at byte {data_start + end} but the file has "
            f"{file_size}; it is truncated"
        )
    return TensorRecord(name, shard, dtype, shape, data_start + begin, expected)


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size or an offset")
    return value


def _read_exactly(record: TensorRecord, buffer: memoryview) -> None:
    try:
        descriptor = os.open(record.file, os.O_RDONLY)
    except OSError as error:
        raise InvalidDataError(f"{record.file}: tensor {record.name!r}: {error}") from error
    try:
        done = 0
        while done < record.nbytes:
            count = os.preadv(descriptor, [buffer[done:]], record.offset + done)
            if count == 0:
                raise InvalidDataError(
                    f"{record.file}: tensor {record.name!r}: file ends after {done} of "
                    f"{record.nbytes} bytes; it was truncated after it was opened"
                )
            done += count
        os.posix_fadvise(descriptor, record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise InvalidDataError(f"{record.file}: tensor {record.name!r}: {error}") from error
    finally:
        os.close(descriptor)
