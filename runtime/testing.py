"""Doubles for tests and replay: a transfer engine that obeys its caller, a clock, made-up experts.

Nothing here runs in production; nothing here measures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..collect.schema import ExpertKey, ModelShape
from .errors import TransferError
from .experts.cache import Kind, Slot
from .experts.layout import BLOCK_ALIGN, ExpertLayout, ExpertSource, Extent, TensorView, block_views
from .experts.thread_transfer import SlotBlocks
from .experts.transfer import Transfer

if TYPE_CHECKING:
    import torch

    from .experts.slots import SlotArena


class VirtualClock:
    """Seconds that pass only when told to; call it like time.perf_counter."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass; ValueError if negative."""
        if seconds < 0.0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self.now += seconds


class ManualCopy:
    """ManualTransfer's Transfer. `wait` completes what is due up to this copy, in service order."""

    is_ordered = False

    def __init__(self, engine: "ManualTransfer", key: ExpertKey, slot: Slot, *, kind: Kind) -> None:
        self.key = key
        self.slot = slot
        self.kind = kind
        self.nbytes = 0
        self.is_started = False
        self.error: TransferError | None = None
        self._is_done = False
        self._engine = engine

    def done(self) -> bool:
        return self._is_done

    def wait(self) -> None:
        while not self._is_done:
            self._engine._serve()
        if self.error is not None:
            raise self.error

    def cancel(self) -> bool:
        if self.is_started or self._is_done:
            return False
        self._engine.fail(self, "the copy was cancelled")
        return True

    def _end(self, error: TransferError | None) -> None:
        self.error = error
        self._is_done = True


class ManualTransfer:
    """A transfer engine without threads: a copy ends when the test says so, or is waited for.

    With `source` and `arena`, completing a copy writes the expert's bytes, read from its files;
    with neither, only the bookkeeping is done and each copy counts `nbytes`. With a `clock`, a copy
    that `wait` completes takes nbytes / bandwidth seconds. `log` records what was served.
    """

    def __init__(
        self,
        source: ExpertSource | None = None,
        arena: SlotBlocks | None = None,
        *,
        nbytes: int = 0,
        clock: VirtualClock | None = None,
        bandwidth: float = 0.0,
    ) -> None:
        self.degraded = False
        self.log: list[tuple[ExpertKey, Kind]] = []
        self._source = source
        self._arena = arena
        self._nbytes = nbytes
        self._clock = clock
        self._bandwidth = bandwidth
        self._on_demand: list[ManualCopy] = []
        self._prefetch: list[ManualCopy] = []
        self._is_closed = False

    @property
    def pending(self) -> list[ManualCopy]:
        """Copies not done yet, in the order in which they would be served."""
        return [*self._on_demand, *self._prefetch]

    def submit(self, key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
        if self._is_closed:
            raise TransferError(f"expert {key}: the transfer engine was closed")
        copy = ManualCopy(self, key, slot, kind=kind)
        copy.nbytes = self._nbytes
        try:
            if self._source is not None and self._arena is not None:
                copy.nbytes = self._source.layout(key).bytes_read
                self._arena.block(slot)
        except Exception as error:
            copy._end(TransferError(f"expert {key} has no bytes to copy: {error!r}"))
            return copy
        queue = self._on_demand if kind is Kind.ON_DEMAND else self._prefetch
        queue.append(copy)
        return copy

    def promote(self, transfer: Transfer) -> None:
        for copy in self._prefetch:
            if copy is transfer:
                self._prefetch.remove(copy)
                self._on_demand.append(copy)
                return

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: tests compute on the CPU."""

    def device_stall_s(self) -> float:
        return 0.0

    def bandwidth(self) -> float:
        return self._bandwidth

    def outstanding_bytes(self) -> int:
        return sum(copy.nbytes for copy in self.pending)

    def close(self) -> None:
        self._is_closed = True
        for copy in self.pending:
            self.fail(copy, "the transfer engine was closed")

    def start(self, transfer: Transfer) -> None:
        """From now on the copy cannot be cancelled."""
        self._find(transfer).is_started = True

    def complete(self, transfer: Transfer) -> None:
        """Copy the bytes and end this transfer, whatever its turn; failed reads fail it."""
        copy = self._find(transfer)
        self._dequeue(copy)
        self.log.append((copy.key, copy.kind))
        try:
            self._write(copy)
        except (OSError, TransferError) as error:
            copy._end(TransferError(f"expert {copy.key}: {error}"))
        else:
            copy._end(None)

    def fail(self, transfer: Transfer, problem: str = "failed by the test") -> None:
        """End this transfer with a TransferError."""
        copy = self._find(transfer)
        self._dequeue(copy)
        copy._end(TransferError(f"expert {copy.key}: {problem}"))

    def complete_all(self) -> None:
        """End all that is pending, in service order."""
        for copy in self.pending:
            self.complete(copy)

    def _serve(self) -> None:
        copy = self.pending[0]
        if self._clock is not None and self._bandwidth:
            self._clock.advance(copy.nbytes / self._bandwidth)
        self.complete(copy)

    def _find(self, transfer: Transfer) -> ManualCopy:
        for copy in self.pending:
            if copy is transfer:
                return copy
        raise ValueError(f"the copy of {transfer.key} is not pending")

    def _dequeue(self, copy: ManualCopy) -> None:
        (self._on_demand if copy in self._on_demand else self._prefetch).remove(copy)

    def _write(self, copy: ManualCopy) -> None:
        if self._source is None or self._arena is None:
            return
        block = self._arena.block(copy.slot)
        for extent in self._source.layout(copy.key).extents:
            with extent.file.open("rb") as file:
                file.seek(extent.offset)
                data = file.read(extent.length)
            if len(data) < extent.length:
                raise TransferError(
                    f"{extent.file}: wanted {extent.length} bytes at offset {extent.offset}, "
                    f"got {len(data)}"
                )
            block[extent.slot_offset : extent.slot_offset + extent.length] = data


class InstantLink:
    """A Link between two arenas on the CPU that copies at once; `num_copied` counts."""

    def __init__(self, host: "SlotArena", arena: "SlotArena") -> None:
        self.num_copied = 0
        self._host = host
        self._arena = arena

    def copy(self, host_slot: Slot, slot: Slot, kind: Kind) -> "InstantLink":
        self._arena.bytes_of(slot).copy_(self._host.bytes_of(host_slot))
        self.num_copied += 1
        return self

    def used(self, slots: Sequence[Slot]) -> None:
        """Nothing: what is computed on the CPU is done."""

    def stall_s(self) -> float:
        return 0.0

    def bandwidth(self) -> float:
        return 1e10

    def close(self) -> None:
        """Nothing is under way."""

    def done(self) -> bool:
        """A link is its own copy: all are over."""
        return True

    def join(self) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class SyntheticExperts:
    """An ExpertSource of random weights, and the tensors that its files were written from."""

    def __init__(
        self,
        shape: ModelShape,
        views: Mapping[str, TensorView],
        *,
        nbytes: int,
        format: str,
    ) -> None:
        self.shape = shape
        self.format = format
        self.views = views
        self.nbytes = nbytes
        self.layouts: dict[ExpertKey, ExpertLayout] = {}
        self.checksums: dict[ExpertKey, int] = {}
        self._tensors: dict[ExpertKey, dict[str, torch.Tensor]] = {}

    def layout(self, key: ExpertKey) -> ExpertLayout:
        return self.layouts[key]

    def checksum(self, key: ExpertKey) -> int | None:
        return self.checksums.get(key)

    def reference(self, key: ExpertKey) -> "dict[str, torch.Tensor]":
        """The tensors of one expert, from memory and not from the files."""
        return self._tensors[key]

    def is_held(self, key: ExpertKey, arena: "SlotArena", slot: Slot) -> bool:
        """True if every view of the slot has exactly this expert's bits."""
        return all(
            arena.view(slot, name).equal(tensor) for name, tensor in self._tensors[key].items()
        )


def write_experts(
    directory: Path,
    shape: ModelShape,
    *,
    dtype: "torch.dtype | None" = None,
    is_packed: bool = True,
    seed: int = 0,
) -> SyntheticExperts:
    """Write random experts of `shape` into `directory` and return their source.

    `is_packed`: one file, one extent an expert on 4096-byte boundaries, padding included, as a
    store has it. Otherwise as in a checkpoint: gate and up apart in one file, down in another, at
    odd offsets. `dtype` defaults to float32.
    """
    import torch

    dtype = dtype or torch.float32
    hidden, inner = shape.hidden_size, shape.expert_size
    views, nbytes = block_views(
        {"gate_up_proj": (dtype, (2 * inner, hidden)), "down_proj": (dtype, (hidden, inner))}
    )
    source = SyntheticExperts(shape, views, nbytes=nbytes, format=str(dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.bin" for name in ("experts", "gate_up", "down")}
    written = {name: bytearray(b"header") for name in files}
    for layer_idx in range(shape.num_moe_layers):
        for expert_idx in range(shape.num_experts):
            key = ExpertKey(layer_idx, expert_idx)
            tensors = {
                name: torch.randn(view.shape, generator=generator).to(dtype)
                for name, view in views.items()
            }
            data = {
                name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
            }
            extents: list[Extent] = []

            def put(name: str, part: bytes, slot_offset: int, out: list[Extent] = extents) -> None:
                out.append(Extent(files[name], len(written[name]), len(part), slot_offset))
                written[name].extend(part)

            down_offset = views["down_proj"].offset
            if is_packed:
                block = bytearray(nbytes)
                for name, part in data.items():
                    block[views[name].offset : views[name].offset + len(part)] = part
                written["experts"].extend(bytes(-len(written["experts"]) % BLOCK_ALIGN))
                put("experts", bytes(block), 0)
            else:
                half = len(data["gate_up_proj"]) // 2
                put("gate_up", data["gate_up_proj"][half:], half)
                written["gate_up"].extend(b"gap")
                put("gate_up", data["gate_up_proj"][:half], 0)
                put("down", data["down_proj"], down_offset)
            digest = xxhash.xxh3_64()
            for extent in extents:
                name = extent.file.stem
                digest.update(written[name][extent.offset : extent.offset + extent.length])
            source.layouts[key] = ExpertLayout(tuple(extents), views, nbytes)
            source.checksums[key] = digest.intdigest()
            source._tensors[key] = tensors
    for name, content in written.items():
        files[name].write_bytes(content)
    return source
