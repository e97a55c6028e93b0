"""Experts read where they lie: the original shards as a source of expert blocks, nothing copied.

Each expert's slice of the fused parameters is described as extents of the shards. That works where
a family's conversion only stacks experts and concatenates rows (or the checkpoint is fused
already); `in_place_obstacle` says why where it does not, and then the experts are packed instead.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...collect.schema import ExpertKey, ModelShape
from ..errors import InvalidDataError
from ..experts.layout import ExpertLayout, Extent, TensorView, block_views
from .adapter import Conversion, MoeLayer
from .checkpoint import Checkpoint, TensorRecord


@dataclass(frozen=True, slots=True)
class _RowBlock:
    """Rows of a projection: one tensor an expert, or all experts fused in one tensor."""

    records: list[TensorRecord]
    is_fused: bool

    def extent(self, expert_idx: int, *, slot_offset: int) -> Extent:
        if not self.is_fused:
            record = self.records[expert_idx]
            return Extent(record.file, record.offset, record.nbytes, slot_offset)
        (fused,) = self.records
        length = fused.nbytes // fused.shape[0]
        return Extent(fused.file, fused.offset + expert_idx * length, length, slot_offset)


FORMAT_OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class CheckpointExperts:
    """An ExpertSource over a checkpoint's own shards. Opening checks every expert tensor's shape.

    Raises InvalidDataError naming file and tensor if one is missing or of another shape or dtype.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: list[MoeLayer],
        *,
        plan: Mapping[str, Conversion],
        shape: ModelShape,
    ) -> None:
        self.shape = shape
        self._layers = layers
        # One entry a layer: projection -> its row blocks (gate and up, or one).
        self._row_blocks = [
            {name: _row_blocks(checkpoint, layer, name, plan=plan) for name in layer.projections}
            for layer in layers
        ]
        dtype = _only_dtype(
            [
                record
                for projections in self._row_blocks
                for blocks in projections.values()
                for block in blocks
                for record in block.records
            ]
        )
        self.format = FORMAT_OF_DTYPE[dtype]
        self.views: Mapping[str, TensorView]
        self.views, self.nbytes = block_views(
            {
                name: (dtype, tuple(getattr(layers[0].experts, name).shape[1:]))
                for name in layers[0].projections
            }
        )

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """The extents of one expert; does not touch the disk."""
        extents: list[Extent] = []
        for name, blocks in self._row_blocks[key.layer_idx].items():
            slot_offset = self.views[name].offset
            for block in blocks:
                extent = block.extent(key.expert_idx, slot_offset=slot_offset)
                extents.append(extent)
                slot_offset += extent.length
        return ExpertLayout(tuple(extents), self.views, self.nbytes)

    def checksum(self, key: ExpertKey) -> int | None:
        """None: safetensors files carry no checksums; a packed store does."""
        return None


def _only_dtype(records: list[TensorRecord]) -> torch.dtype:
    (dtype, count), *_ = Counter(record.dtype for record in records).most_common()
    if count < len(records):
        usual = next(record for record in records if record.dtype == dtype)
        other = next(record for record in records if record.dtype != dtype)
        raise InvalidDataError(
            f"{other.file}: tensor {other.name!r} is {other.dtype} and {usual.name!r} is {dtype}; "
            "the experts of a checkpoint have one dtype"
        )
    return dtype


def in_place_obstacle(
    checkpoint: Checkpoint, layers: list[MoeLayer], plan: Mapping[str, Conversion]
) -> str | None:
    """Why the experts cannot be read from the shards as they lie, or None if they can."""
    for name in layers[0].projections:
        conversion = plan.get(f"{layers[0].name}.{name}")
        if conversion is None:
            continue  # a missing tensor, which opening CheckpointExperts reports by name
        record = checkpoint.tensors[conversion.names()[0]]
        if record.dtype not in FORMAT_OF_DTYPE:
            return f"{record.name!r} is stored as {record.dtype}"
        if conversion.concatenated_sources() is None and conversion.converter is not None:
            return f"{record.name!r} is rearranged on the way to {name!r}"
    return None


def _row_blocks(
    checkpoint: Checkpoint, layer: MoeLayer, name: str, *, plan: Mapping[str, Conversion]
) -> list[_RowBlock]:
    target = f"{layer.name}.{name}"
    wanted = tuple(getattr(layer.experts, name).shape)  # [E, ...]
    conversion = plan.get(target)
    if conversion is None:
        raise InvalidDataError(
            f"{checkpoint.folder}: no tensor of the checkpoint makes up {target!r} {list(wanted)}; "
            "a shard is missing or config.json belongs to another model"
        )
    sources = conversion.concatenated_sources()
    if sources is None:
        (source,) = conversion.names()
        _check(checkpoint.tensors[source], wanted)
        return [_RowBlock([checkpoint.tensors[source]], is_fused=True)]
    blocks = [[checkpoint.tensors[source] for source in sources_] for sources_ in sources]
    block_rows = wanted[1] // len(blocks)
    for records in blocks:
        if len(records) != wanted[0]:
            raise InvalidDataError(
                f"{records[0].file}: {target!r} is made of {wanted[0]} experts, but the checkpoint "
                f"has {len(records)} tensors like {records[0].name!r}"
            )
        for record in records:
            _check(record, (block_rows, *wanted[2:]))
    return [_RowBlock(records, is_fused=False) for records in blocks]


def _check(record: TensorRecord, wanted: tuple[int, ...]) -> None:
    if record.shape != wanted:
        raise InvalidDataError(
            f"{record.file}: tensor {record.name!r} has shape {list(record.shape)}, config.json "
            f"wants {list(wanted)}"
        )
    if record.dtype not in FORMAT_OF_DTYPE:
        raise InvalidDataError(
            f"{record.file}: tensor {record.name!r} is {record.dtype}; experts are read as "
            "float32, bfloat16 or float16"
        )
