"""Made-up experts in an arena as the engine's, and what the right results of ops on them are.

Weights are random bytes of each format, quantised from nothing, so that an arena of gigabytes is
made in seconds. Results are checked against dequantised weights, a block of rows at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.activation import apply_activation
from ..kernels.quantization import dequantize, part_shapes
from ..kernels.weights import ExpertWeights, part_name
from ..runtime.experts.memory import map_memory

_ALIGNMENT = 64
_PAGE = 4096
_TILE = 1 << 22
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ExpertCase:
    """Experts of one shape and format on one device, in at least `arena_bytes` of slots."""

    hidden: int
    inner: int
    fmt: str
    arena_bytes: int
    least_slots: int
    device: torch.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of both projections."""
        return {
            "gate_up_proj": (2 * self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    @cached_property
    def _parts(self) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
        """Of each tensor of a slot: offset, dtype, shape."""
        parts, offset = {}, 0
        for name, (n, k) in self.shapes.items():
            for part, (dtype, shape) in part_shapes(self.fmt, n, k).items():
                parts[part_name(name, part)] = (offset, dtype, shape)
                size = dtype.itemsize * torch.Size(shape).numel()
                offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        return parts

    @property
    def block_bytes(self) -> int:
        """Of one slot, padded as in the engine's arena."""
        offset, dtype, shape = list(self._parts.values())[-1]
        size = offset + dtype.itemsize * torch.Size(shape).numel()
        return -(-size // _PAGE) * _PAGE

    @property
    def expert_bytes(self) -> int:
        """Weights and scales that computing one expert reads."""
        return sum(dtype.itemsize * torch.Size(s).numel() for _, dtype, s in self._parts.values())

    @cached_property
    def num_slots(self) -> int:
        """Slots of the arena."""
        return max(self.least_slots, -(-self.arena_bytes // self.block_bytes))

    @cached_property
    def arena(self) -> Tensor:
        """The slots as bytes [slots, block], in large pages on the CPU."""
        nbytes = self.num_slots * self.block_bytes
        if self.device.type == "cpu":
            flat = torch.frombuffer(map_memory(nbytes), dtype=torch.uint8)
        else:
            flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return flat.view(self.num_slots, self.block_bytes)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Views of the arena by name, filled with random weights of size 1 / sqrt(inputs)."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        views = {}
        for name, (offset, dtype, shape) in self._parts.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            view = self.arena[:, offset : offset + size].view(dtype).unflatten(1, shape)
            columns = self.shapes[name.partition(".")[0]][1]
            line = self._values(name, dtype, generator, scale=columns**-0.5)
            count = torch.Size(shape).numel()
            line = line.repeat(-(-(count + self.num_slots) // line.numel()))
            for slot in range(self.num_slots):
                view[slot].view(-1).copy_(line[slot : slot + count])
            views[name] = view
        return views

    @cached_property
    def weights(self) -> ExpertWeights:
        """The arena as the ops take it."""
        return ExpertWeights(self.tensors, self.hidden, fmt=self.fmt)

    def _values(
        self, name: str, dtype: torch.dtype, generator: torch.Generator, *, scale: float
    ) -> Tensor:
        size, device = (_TILE,), self.device
        if "." in name:
            step = {"int8": 1 / 64, "int4": 1 / 4, "nf4": 2.0}[self.fmt]
            return (
                (0.5 + torch.rand(size, generator=generator, device=device))
                .mul_(scale * step)
                .to(dtype)
            )
        if dtype.is_floating_point:
            return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
        low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
        return torch.randint(low, high, size, generator=generator, device=device, dtype=dtype)

    def parts(self, name: str, slot: int) -> dict[str, Tensor]:
        """One projection of one slot, by part."""
        return {
            part: self.tensors[part_name(name, part)][slot]
            for part in part_shapes(self.fmt, *self.shapes[name])
        }

    def rows_of(self, name: str, slot: int, count: int) -> dict[str, Tensor]:
        """The first `count` rows of one projection as a matrix of its own, by part."""
        height = self.shapes[name][0]
        return {
            part: value[: count * value.shape[0] // height]
            for part, value in self.parts(name, slot).items()
        }

    def matrix_product(
        self, rows: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """rows [M, K] times the [N, K] matrix in `parts` -> [M, N] in fp32, not rounded."""
        return _blocked_product(rows, parts, self.fmt, shape)

    def expert_product(self, rows: Tensor, name: str, slot: int) -> Tensor:
        """rows [M, K] times one projection [N, K] -> [M, N] in fp32, by its plain definition."""
        return self.matrix_product(rows, self.parts(name, slot), self.shapes[name])

    def expert_rows(self, rows: Tensor, slot: int) -> Tensor:
        """The expert in `slot` on rows [M, H] -> [M, H] in fp32, not rounded."""
        inner = apply_activation(self.expert_product(rows, "gate_up_proj", slot), "silu")
        return self.expert_product(inner, "down_proj", slot)


def _blocked_product(
    rows: Tensor, parts: Mapping[str, Tensor], fmt: str, shape: tuple[int, int]
) -> Tensor:
    n, k = shape
    # nf4 is flat: its parts divide by rows as long as rows are whole blocks of 64.
    height = max(1, _BLOCK_ELEMENTS // k)
    out = rows.new_empty((rows.shape[0], n), dtype=torch.float32)
    for start in range(0, n, height):
        end = min(start + height, n)
        block = {
            part: value[start * value.numel() // n : end * value.numel() // n]
            if fmt == "nf4"
            else value[start:end]
            for part, value in parts.items()
        }
        dense = dequantize(block, fmt, dtype=torch.float32, shape=(end - start, k))
        out[:, start:end] = functional.linear(rows.float(), dense)
    return out


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Relative RMS error; infinity where the result holds NaN or infinity."""
    error = float((result.double() - truth.double()).norm() / truth.double().norm())
    return error if error < float("inf") else float("inf")
