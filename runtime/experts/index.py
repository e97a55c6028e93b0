"""The expert store's `index.json`: what it says, how it is sealed, what it may not contradict.

Knows no shard's contents: `store` compares the index with the files.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import torch

from ...collect.durable import durable_write
from ...collect.schema import ExpertKey, ModelShape
from ...kernels.quantization import FORMATS
from ..errors import InvalidDataError
from .block import projection_parts, projection_sizes
from .identity import SourceIdentity
from .layout import BLOCK_ALIGN, VIEW_ALIGN

SCHEMA_VERSION = 1
INDEX_NAME = "index.json"
PARTIAL_INDEX_NAME = "index.partial.json"
MAX_INDEX_BYTES = 256 * 2**20
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_NAME = re.compile(r"experts-[0-9]{5}(-[0-9]{3,})?\.safetensors")

_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"}\n?\Z')


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor inside every block: `dtype` is a key of DTYPES, `offset` counts from the block."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


class Block(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One expert in its shard; `offset` counts from the file, `xxh3_64` is 16 hex digits."""

    layer_idx: int
    expert_idx: int
    offset: int
    xxh3_64: str

    @property
    def key(self) -> ExpertKey:
        return ExpertKey(self.layer_idx, self.expert_idx)


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One safetensors file; blocks in file order."""

    file: str
    nbytes: int
    blocks: tuple[Block, ...]


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ModelShape on disk."""

    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    fingerprint: str


class StoreIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole index. A partial index is the same thing with shards still missing.

    `sha256` is the last field and covers the file's bytes before it.
    """

    kind: Literal["outrider-expert-store"]
    schema: int
    format: str
    shape: Shape
    source: SourceIdentity
    block_bytes: int
    views: dict[str, View]
    shards: tuple[Shard, ...]
    software: dict[str, str]
    sha256: str = ""

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(**msgspec.structs.asdict(self.shape))

    def blocks(self) -> Iterator[tuple[Shard, Block]]:
        """Every block with its shard, in shard order."""
        for shard in self.shards:
            for block in shard.blocks:
                yield shard, block


def tensor_name(layer_idx: int, expert_idx: int) -> str:
    """The name of one expert's block inside its shard."""
    return f"layers.{layer_idx}.experts.{expert_idx}"


def write_index(path: Path, index: StoreIndex) -> None:
    """Seal `index` and replace `path` with it, durably; blocks, raises OSError as the disk does."""
    unsealed = msgspec.json.encode(msgspec.structs.replace(index, sha256=""))
    body = unsealed.removesuffix(b'"sha256":""}')
    seal = hashlib.sha256(body).hexdigest()
    with durable_write(path) as file:
        file.write(body + b'"sha256":"' + seal.encode() + b'"}\n')


def read_index(path: Path) -> StoreIndex:
    """Read a sealed index and check it against itself; touches no shard.

    Raises InvalidDataError naming `path` and what is wrong; FileNotFoundError where there is none.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise InvalidDataError(f"{path} is larger than {MAX_INDEX_BYTES} bytes: not an index")
    raw = path.read_bytes()
    seal = _SEAL.search(raw)
    if seal is None:
        raise InvalidDataError(f"{path} is cut short or not a store's index: its seal is missing")
    digest = hashlib.sha256(raw[: seal.start()]).hexdigest()
    if digest != seal[1].decode():
        raise InvalidDataError(
            f"{path} was damaged or edited: its sha256 is {digest[:16]}..., "
            f"but it was sealed with {seal[1][:16].decode()}..."
        )
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("schema", b"missing")
        if bytes(version) != str(SCHEMA_VERSION).encode():
            raise InvalidDataError(
                f"{path} has schema version {bytes(version).decode()}, this version of outrider "
                f"reads {SCHEMA_VERSION}: pack the store again"
            )
        index = msgspec.json.decode(raw, type=StoreIndex)
    except msgspec.MsgspecError as error:
        raise InvalidDataError(f"{path} is not a store's index: {error}") from error
    problem = contradiction(index)
    if problem is not None:
        raise InvalidDataError(f"{path}: {problem}")
    return index


def contradiction(index: StoreIndex) -> str | None:
    """The first thing in `index` that cannot be true, naming shard and tensor, or None."""
    return _wrong_shape(index) or _wrong_views(index) or _wrong_blocks(index)


def _wrong_shape(index: StoreIndex) -> str | None:
    shape = index.shape
    for field in ("num_moe_layers", "num_experts", "top_k", "hidden_size", "expert_size"):
        if getattr(shape, field) < 1:
            return f"shape.{field} is {getattr(shape, field)}, at least 1 is possible"
    if index.format not in FORMATS:
        return f"format is {index.format!r}, known are {', '.join(FORMATS)}"
    if index.block_bytes < BLOCK_ALIGN or index.block_bytes % BLOCK_ALIGN:
        return f"block_bytes is {index.block_bytes}, not a multiple of {BLOCK_ALIGN}"
    return None


def _wrong_views(index: StoreIndex) -> str | None:
    end, previous = 0, "the block's start"
    for name, view in sorted(index.views.items(), key=lambda item: item[1].offset):
        if view.dtype not in DTYPES:
            return f"view {name} has dtype {view.dtype!r}, known are {', '.join(DTYPES)}"
        if any(length < 1 for length in view.shape):
            return f"view {name} has the shape {view.shape}"
        if view.offset % VIEW_ALIGN:
            return f"view {name} begins at {view.offset}, not a multiple of {VIEW_ALIGN}"
        if view.offset < end:
            return f"view {name} begins at {view.offset}, inside {previous} (which ends at {end})"
        end, previous = view.offset + view.nbytes, name
    if end > index.block_bytes:
        return f"view {previous} ends at {end}, beyond the block's {index.block_bytes} bytes"
    return _wrong_parts(index)


def _wrong_parts(index: StoreIndex) -> str | None:
    if "down_proj" not in index.views:
        return "view down_proj is missing"
    if "gate_up_proj" not in index.views and "up_proj" not in index.views:
        return "view gate_up_proj is missing"
    for projection, size in projection_sizes(index.model_shape).items():
        if projection not in index.views:
            continue
        try:
            parts = projection_parts(projection, size, fmt=index.format)
        except InvalidDataError as error:
            return str(error)
        for name, (dtype, shape) in parts.items():
            view = index.views.get(name)
            if view is None:
                return f"view {name} is missing, {index.format} needs it"
            if (DTYPES[view.dtype], view.shape) != (dtype, shape):
                return (
                    f"view {name} is {view.dtype} {list(view.shape)}, {index.format} needs "
                    f"{DTYPE_NAMES[dtype]} {list(shape)}"
                )
    return None


def _wrong_blocks(index: StoreIndex) -> str | None:
    seen: set[ExpertKey] = set()
    files: set[str] = set()
    for shard in index.shards:
        if not SHARD_NAME.fullmatch(shard.file):
            return f"{shard.file!r} is no shard's name"
        if shard.file in files:
            return f"shard {shard.file} is listed twice"
        files.add(shard.file)
        if not shard.blocks:
            return f"shard {shard.file} holds no expert"
        expected = shard.blocks[0].offset
        for block in shard.blocks:
            name = f"{tensor_name(*block.key)} in shard {shard.file}"
            if block.key in seen:
                return f"{name} is listed twice"
            seen.add(block.key)
            layer_fits = 0 <= block.layer_idx < index.shape.num_moe_layers
            if not layer_fits or not 0 <= block.expert_idx < index.shape.num_experts:
                return f"{name} is outside the model's shape"
            if block.offset % BLOCK_ALIGN or block.offset < BLOCK_ALIGN:
                return f"{name} begins at {block.offset}, not on a {BLOCK_ALIGN} boundary"
            if block.offset != expected:
                return f"{name} begins at {block.offset}, expected at {expected}"
            if not re.fullmatch(r"[0-9a-f]{16}", block.xxh3_64):
                return f"{name} has the checksum {block.xxh3_64!r}, not 16 hex digits"
            expected += index.block_bytes
        if shard.nbytes != expected:
            return f"shard {shard.file} has {shard.nbytes} bytes, its tensors end at {expected}"
    return None
