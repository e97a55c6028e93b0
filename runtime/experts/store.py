"""The expert store, read: a folder with `index.json` and shards, one aligned block an expert.

Knows nothing of how stores are made (`pack`) or where they are kept (`store_cache`).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import xxhash

from ...collect.schema import ExpertKey, ModelShape
from ..errors import InvalidDataError
from .identity import SourceIdentity
from .index import (
    DTYPES,
    INDEX_NAME,
    PARTIAL_INDEX_NAME,
    Block,
    Shard,
    StoreIndex,
    read_index,
    tensor_name,
)
from .layout import ExpertLayout, Extent, TensorView
from .shard import check_header, shard_header


class ExpertStore:
    """An `ExpertSource` over a finished store; holds no open file, and is safe to share.

    Opening reads the index and each shard's header: it refuses a store that is incomplete, edited,
    truncated or mixed from several, naming shard and tensor. It does not read the blocks: a flipped
    bit inside one is found by `verify`, or by whoever compares `checksum` after a read.
    """

    shape: ModelShape
    format: str
    nbytes: int
    views: Mapping[str, TensorView]

    def __init__(self, path: Path) -> None:
        """Blocks on the disk; raises InvalidDataError where `path` holds no sound store."""
        self.path = path.absolute()
        self.index = _complete_index(self.path)
        self.shape = self.index.model_shape
        self.format = self.index.format
        self.nbytes = self.index.block_bytes
        self.views = MappingProxyType(
            {
                name: TensorView(DTYPES[view.dtype], view.shape, view.offset)
                for name, view in self.index.views.items()
            }
        )
        for shard in self.index.shards:
            check_shard(self.path, self.index, shard)
        self._places = {
            block.key: (self.path / shard.file, block) for shard, block in self.index.blocks()
        }

    @property
    def source(self) -> SourceIdentity:
        """The checkpoint that the store was made from."""
        return self.index.source

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.nbytes for shard in self.index.shards)

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """One extent, aligned to 4096 at both ends; raises KeyError for an expert not there."""
        file, block = self._places[key]
        extent = Extent(file, block.offset, self.nbytes, 0)
        return ExpertLayout((extent,), self.views, self.nbytes)

    def checksum(self, key: ExpertKey) -> int:
        """xxh3_64 of the expert's whole block, padding included."""
        return int(self._places[key][1].xxh3_64, 16)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[ExpertKey]:
        """Read every block and return the keys whose bytes are not those that were packed.

        What cannot be read counts as damaged. `progress(done, total)` is told after each block.
        Holds one block in memory; blocks on the disk for as long as reading the store takes.
        """
        damaged: list[ExpertKey] = []
        buffer = bytearray(self.nbytes)
        done = 0
        for shard in self.index.shards:
            for block, is_sound in self._read_blocks(shard, buffer):
                if not is_sound:
                    damaged.append(block.key)
                done += 1
                if progress is not None:
                    progress(done, len(self._places))
        return sorted(damaged)

    def _read_blocks(self, shard: Shard, buffer: bytearray) -> Iterator[tuple[Block, bool]]:
        try:
            file = (self.path / shard.file).open("rb", buffering=0)
        except OSError:
            yield from ((block, False) for block in shard.blocks)
            return
        with file:
            for block in shard.blocks:
                try:
                    file.seek(block.offset)
                    is_whole = _fill(file.readinto, buffer)
                except OSError:
                    is_whole = False
                checksum = xxhash.xxh3_64_intdigest(buffer)
                yield block, is_whole and checksum == int(block.xxh3_64, 16)


def check_shard(folder: Path, index: StoreIndex, shard: Shard) -> None:
    """Raise InvalidDataError unless the shard's file has the header and size the index implies."""
    names = [tensor_name(*block.key) for block in shard.blocks]
    header = shard_header(names, index.block_bytes, metadata=shard_metadata(index))
    if shard.blocks[0].offset != len(header):
        raise InvalidDataError(
            f"{folder / INDEX_NAME}: {names[0]} in shard {shard.file} begins at "
            f"{shard.blocks[0].offset}, but the shard's data begins at {len(header)}"
        )
    check_header(folder / shard.file, header, nbytes=shard.nbytes)


def shard_metadata(index: StoreIndex) -> dict[str, str]:
    """What every shard's header says of itself, so that a foreign shard is known as one."""
    return {
        "kind": index.kind,
        "schema": str(index.schema),
        "format": index.format,
        "fingerprint": index.source.fingerprint,
    }


def _complete_index(path: Path) -> StoreIndex:
    try:
        index = read_index(path / INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        if (path / PARTIAL_INDEX_NAME).exists():
            raise InvalidDataError(
                f"packing the expert store {path} was not finished: run `outrider pack` again, "
                "it goes on where it stopped"
            ) from error
        raise InvalidDataError(f"{path} is no expert store: {INDEX_NAME} is missing") from error
    except OSError as error:
        raise InvalidDataError(f"{path / INDEX_NAME} cannot be read: {error.strerror}") from error
    present = {block.key for _, block in index.blocks()}
    for layer_idx in range(index.shape.num_moe_layers):
        for expert_idx in range(index.shape.num_experts):
            if (layer_idx, expert_idx) not in present:
                raise InvalidDataError(
                    f"{path / INDEX_NAME} lists no {tensor_name(layer_idx, expert_idx)}"
                )
    return index


def _fill(readinto: Callable[[memoryview], int | None], buffer: bytearray) -> bool:
    filled = 0
    with memoryview(buffer) as view:
        while filled < len(buffer):
            count = readinto(view[filled:])
            if not count:
                return False
            filled += count
    return True
