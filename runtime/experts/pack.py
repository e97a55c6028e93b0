"""Making an expert store: one MoE layer at a time, resumable after a kill at any point.

Knows no model family and no checkpoint file: a callable gives each layer's tensors.
"""

import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor

from ...collect.durable import durable_write, fsync_directory, remove_leftovers
from ...collect.schema import ExpertKey, ModelShape
from ...kernels.quantization import FORMATS
from ..errors import InvalidDataError, UsageError
from .block import block_parts, check_layer, fill_block
from .disk import LOCK_NAME, explained, folder_lock, require_free
from .identity import SourceIdentity
from .index import (
    DTYPE_NAMES,
    INDEX_NAME,
    PARTIAL_INDEX_NAME,
    SCHEMA_VERSION,
    SHARD_NAME,
    Block,
    Shape,
    Shard,
    StoreIndex,
    View,
    read_index,
    tensor_name,
    write_index,
)
from .layout import block_views
from .shard import shard_header
from .store import ExpertStore, check_shard, shard_metadata

MAX_SHARD_BYTES = 4 * 2**30
_INDEX_ALLOWANCE_BYTES = 2**20  # both indexes, beside the shards, when free space is checked

Layers = Callable[[int], Mapping[str, Tensor]]
Progress = Callable[[int, int], None]


def pack_store(
    out: Path,
    *,
    shape: ModelShape,
    fmt: str,
    layers: Layers,
    source: SourceIdentity,
    is_transposed: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_wait: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExpertStore:
    """Make the store of `source` in `fmt` in the folder `out`, or finish one begun there.

    `layers(l)` gives MoE layer l's fused tensors: `gate_up_proj` [E, 2I, H] (or `up_proj`
    [E, I, H]) and `down_proj` [E, H, I], with `is_transposed` their last two dimensions swapped;
    anything else [E, ...] (biases) is stored in its own dtype. It is called once for each layer
    that still lacks a shard, and its result is dropped before the next call: never more than one
    layer and one block are held. Stored projections are always [output, input].

    A finished store of the same source and format is returned as it is, a damaged shard of it made
    again. A finished store of anything else is refused unless `overwrite`. `progress(done, total)`
    counts experts. Blocks on the disk, and on another process that packs into `out` (`on_wait(out)`
    is called first).

    Raises InvalidDataError for tensors that do not fit `shape` or hold what `fmt` cannot express,
    and where the source's files change meanwhile; OutriderError for a full or read-only disk;
    UsageError for an unknown format or a folder that holds other things.
    """
    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}: known are {', '.join(FORMATS)}")
    if not source.fingerprint:
        raise ValueError("a store is not packed from a source without a fingerprint")
    if not shape.fingerprint:
        shape = replace(shape, fingerprint=source.fingerprint)
    wanted = StoreIndex(
        kind="outrider-expert-store",
        schema=SCHEMA_VERSION,
        format=fmt,
        shape=Shape(**asdict(shape)),
        source=source,
        block_bytes=0,
        views={},
        shards=(),
        software=_software(),
    )
    out = out.absolute()
    with folder_lock(out, on_wait=on_wait):
        packing = _Packing(
            out, wanted, overwrite=overwrite, max_shard_bytes=max_shard_bytes, progress=progress
        )
        if not packing.is_finished:
            packing.run(layers, is_transposed=is_transposed)
        packing.tidy()
        return ExpertStore(out)


def shard_plan(
    shape: ModelShape | Shape, block_bytes: int, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[ExpertKey]]:
    """Which experts stand in which file, in order: a layer a shard, or several for a large one."""
    per_shard = max(1, max_shard_bytes // block_bytes)
    is_split = shape.num_experts > per_shard
    plan: dict[str, list[ExpertKey]] = {}
    for layer_idx in range(shape.num_moe_layers):
        for piece, first in enumerate(range(0, shape.num_experts, per_shard)):
            suffix = f"-{piece:03d}" if is_split else ""
            last = min(first + per_shard, shape.num_experts)
            plan[f"experts-{layer_idx:05d}{suffix}.safetensors"] = [
                ExpertKey(layer_idx, expert_idx) for expert_idx in range(first, last)
            ]
    return plan


class _Packing:
    """One run of the packer, in a folder whose lock is held.

    `index` is None until the first layer has said what a block looks like. From then on the partial
    index on disk lists exactly the shards of `index`; it is always written before a file that it
    does not list is removed, and after one that it lists was renamed into place.
    """

    def __init__(
        self,
        out: Path,
        wanted: StoreIndex,
        *,
        overwrite: bool,
        max_shard_bytes: int,
        progress: Progress | None,
    ) -> None:
        self.out = out
        self.wanted = wanted
        self.max_shard_bytes = max_shard_bytes
        self.progress = progress
        self.plan: dict[str, list[ExpertKey]] = {}
        with explained(out):
            self.index = self._resumable(overwrite=overwrite)
        self.is_finished = self._is_sealed()

    def run(self, layers: Layers, *, is_transposed: bool) -> None:
        if self.index is not None:
            self._begin(self.index)
        for layer_idx in range(self.wanted.shape.num_moe_layers):
            if self.index is None or self._missing(layer_idx):
                self._pack_layer(layer_idx, layers(layer_idx), is_transposed=is_transposed)
        assert self.index is not None
        with explained(self.out / INDEX_NAME, needed_bytes=_INDEX_ALLOWANCE_BYTES):
            write_index(self.out / INDEX_NAME, self.index)

    def tidy(self) -> None:
        """Remove what a finished store does not need: the partial index, a killed run's files."""
        with explained(self.out):
            remove_leftovers(self.out)
            (self.out / PARTIAL_INDEX_NAME).unlink(missing_ok=True)

    def _resumable(self, *, overwrite: bool) -> StoreIndex | None:
        """What is there already of the wanted store, with the shards that are sound."""
        for name in (INDEX_NAME, PARTIAL_INDEX_NAME):
            path = self.out / name
            try:
                index = read_index(path)
            except FileNotFoundError:
                continue
            except InvalidDataError as error:
                if overwrite or name == PARTIAL_INDEX_NAME:
                    continue
                raise InvalidDataError(f"{error}; remove {self.out} to pack it again") from error
            if _making(index) == _making(self.wanted):
                self._set_plan(index)
                sound = tuple(shard for shard in index.shards if self._is_sound(index, shard))
                return msgspec.structs.replace(
                    index, shards=sound, source=self.wanted.source, software=self.wanted.software
                )
            if name == INDEX_NAME and not overwrite:
                raise UsageError(
                    f"{self.out} holds an expert store of another model, version or format "
                    f"({index.format}): name another folder, or remove it"
                )
        ours = {INDEX_NAME, PARTIAL_INDEX_NAME, LOCK_NAME}
        for entry in sorted(self.out.iterdir()):
            is_leftover = entry.name.startswith(".") and entry.name.endswith(".tmp")
            if not (entry.name in ours or is_leftover or SHARD_NAME.fullmatch(entry.name)):
                raise UsageError(
                    f"{self.out} is not empty and holds no expert store ({entry.name} is there): "
                    "name another folder"
                )
        return None

    def _set_plan(self, index: StoreIndex) -> None:
        self.plan = shard_plan(index.shape, index.block_bytes, max_shard_bytes=self.max_shard_bytes)

    def _is_sound(self, index: StoreIndex, shard: Shard) -> bool:
        if self.plan.get(shard.file) != [block.key for block in shard.blocks]:
            return False
        try:
            check_shard(self.out, index, shard)
        except InvalidDataError:
            return False
        return True

    def _is_sealed(self) -> bool:
        """Whether the folder holds the wanted store, finished, with nothing left to write."""
        if self.index is None or len(self.index.shards) < len(self.plan):
            return False
        try:
            sealed = read_index(self.out / INDEX_NAME)
        except (FileNotFoundError, InvalidDataError):
            return False
        return sealed.shards == self.index.shards and sealed.source == self.wanted.source

    def _missing(self, layer_idx: int) -> list[str]:
        assert self.index is not None
        present = {shard.file for shard in self.index.shards}
        return [
            file
            for file, keys in self.plan.items()
            if keys[0].layer_idx == layer_idx and file not in present
        ]

    def _needed_bytes(self) -> int:
        assert self.index is not None
        present = {shard.file for shard in self.index.shards}
        needed = _INDEX_ALLOWANCE_BYTES
        for file, keys in self.plan.items():
            if file not in present:
                needed += len(self._header(keys)) + len(keys) * self.index.block_bytes
        return needed

    def _header(self, keys: list[ExpertKey]) -> bytes:
        assert self.index is not None
        names = [tensor_name(*key) for key in keys]
        return shard_header(names, self.index.block_bytes, metadata=shard_metadata(self.index))

    def _begin(self, index: StoreIndex) -> None:
        """Make the folder hold the partial `index`, its shards, and nothing else of a store."""
        self.index = index
        with explained(self.out, needed_bytes=self._needed_bytes()):
            remove_leftovers(self.out)
            write_index(self.out / PARTIAL_INDEX_NAME, index)
            if len(index.shards) < len(self.plan):
                (self.out / INDEX_NAME).unlink(missing_ok=True)
            present = {shard.file for shard in index.shards}
            for path in sorted(self.out.iterdir()):
                if SHARD_NAME.fullmatch(path.name) and path.name not in present:
                    path.unlink()
            fsync_directory(self.out)
        require_free(self.out, self._needed_bytes())
        self._report(0)

    def _pack_layer(
        self, layer_idx: int, tensors: Mapping[str, Tensor], *, is_transposed: bool
    ) -> None:
        shape = self.wanted.model_shape
        check_layer(layer_idx, tensors, shape=shape, is_transposed=is_transposed)
        views, block_bytes = block_views(block_parts(tensors, shape=shape, fmt=self.wanted.format))
        recorded = {
            name: View(dtype=DTYPE_NAMES[view.dtype], shape=view.shape, offset=view.offset)
            for name, view in views.items()
        }
        if self.index is None:
            index = msgspec.structs.replace(self.wanted, block_bytes=block_bytes, views=recorded)
            self._set_plan(index)
            self._begin(index)
        assert self.index is not None
        if recorded != self.index.views:
            raise InvalidDataError(
                f"MoE layer {layer_idx} does not have the tensors that the store began with: "
                f"{sorted(recorded)}, before {sorted(self.index.views)}"
            )
        block = torch.zeros(block_bytes, dtype=torch.uint8)
        for file in self._missing(layer_idx):
            shard = self._write_shard(
                file,
                lambda key: fill_block(
                    block,
                    views,
                    tensors,
                    key=key,
                    fmt=self.wanted.format,
                    is_transposed=is_transposed,
                ),
            )
            changed = self.wanted.source.changed_files()
            if changed:
                raise InvalidDataError(
                    f"the model changed while it was packed: {', '.join(changed)} in "
                    f"{self.wanted.source.folder} is not what it was at the start; pack it again"
                )
            shards = sorted((*self.index.shards, shard), key=lambda shard: shard.file)
            self.index = msgspec.structs.replace(self.index, shards=tuple(shards))
            partial = self.out / PARTIAL_INDEX_NAME
            with explained(partial, needed_bytes=self._needed_bytes()):
                write_index(partial, self.index)

    def _write_shard(self, file: str, block_of: Callable[[ExpertKey], memoryview]) -> Shard:
        assert self.index is not None
        keys = self.plan[file]
        header = self._header(keys)
        path, needed = self.out / file, self._needed_bytes()
        offset = len(header)
        blocks: list[Block] = []
        # Only our own writing is explained: an OSError of `block_of` or `progress` is not a disk's.
        with ExitStack() as stack:
            with explained(path, needed_bytes=needed):
                output = stack.enter_context(durable_write(path))
                output.write(header)
            for key in keys:
                block = block_of(key)
                checksum = f"{xxhash.xxh3_64_intdigest(block):016x}"
                with explained(path, needed_bytes=needed):
                    output.write(block)
                blocks.append(Block(*key, offset=offset, xxh3_64=checksum))
                offset += len(block)
                self._report(len(blocks))
            with explained(path, needed_bytes=needed):
                stack.close()
        return Shard(file=file, nbytes=offset, blocks=tuple(blocks))

    def _report(self, done_in_shard: int) -> None:
        if self.progress is not None and self.index is not None:
            done = sum(len(shard.blocks) for shard in self.index.shards) + done_in_shard
            self.progress(done, self.wanted.model_shape.num_routed_experts)


def _making(index: StoreIndex) -> tuple[object, ...]:
    """What must agree for shards of one index to serve in another."""
    return index.schema, index.format, index.shape, index.source.fingerprint


@cache
def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("outrider", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
