"""The slot arena as the kernels see it: two projections by slot id, in one format, checked once.

Knows slots and shapes; does not know which expert lies in a slot, nor where its bytes came from.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .activation import canonical_activation
from .quantization import PLAIN_DTYPES, FormatError, check_format, check_parts, part_shapes

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def part_name(projection: str, part: str) -> str:
    """Name in the arena of one part of a projection: `down_proj`, `down_proj.scale`, ..."""
    return projection if part == "weight" else f"{projection}.{part}"


class ExpertWeights:
    """Gated experts in S slots: gate_up [S, 2I, H], down [S, H, I], each as the parts of `fmt`.

    `arena` maps `gate_up_proj`, `down_proj`, their further parts (`gate_up_proj.scale`, ...) and,
    where the family has them, `gate_up_proj_bias` [S, 2I] and `down_proj_bias` [S, H] to tensors
    whose first dimension is the slot. That dimension may have any stride (blocks of an arena, more
    than 2^31 elements apart in all); the dimensions inside a slot are contiguous.
    `is_transposed` (plain formats only): [S, H, 2I] and [S, I, H]. `is_concatenated=False`: gate
    and up rows alternate. No copies are made; the tensors must outlive this object.
    Raises FormatError for a missing part, another shape or dtype, or a layout the format lacks.
    """

    def __init__(
        self,
        arena: Mapping[str, Tensor],
        hidden_size: int,
        *,
        fmt: str,
        activation: str = "silu",
        is_transposed: bool = False,
        is_concatenated: bool = True,
    ) -> None:
        check_format(fmt)
        if is_transposed and fmt not in PLAIN_DTYPES:
            raise FormatError(f"{fmt} rows run along the inputs: no transposed experts")
        self.fmt = fmt
        self.activation = canonical_activation(activation)
        self.is_transposed = is_transposed
        self.is_concatenated = is_concatenated
        self.hidden_size = hidden_size
        self.gate_up = _projection_parts(arena, "gate_up_proj", fmt)
        self.down = _projection_parts(arena, "down_proj", fmt)
        self.intermediate_size = self._intermediate_size()
        self.gate_up_bias = arena.get("gate_up_proj_bias")
        self.down_bias = arena.get("down_proj_bias")
        self.num_slots = self.gate_up["weight"].shape[0]
        self._check()

    def _intermediate_size(self) -> int:
        weight = self.gate_up["weight"]
        if self.fmt == "nf4":
            return weight.shape[-1] // self.hidden_size
        return weight.shape[-1 if self.is_transposed else -2] // 2

    def _check(self) -> None:
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if self.is_transposed:
            gate_up_shape, down_shape = (hidden, 2 * intermediate), (intermediate, hidden)
        else:
            gate_up_shape, down_shape = (2 * intermediate, hidden), (hidden, intermediate)
        check_parts(self.gate_up, self.fmt, gate_up_shape)
        check_parts(self.down, self.fmt, down_shape)
        tensors = [*self.gate_up.values(), *self.down.values()]
        for bias, length in (
            (self.gate_up_bias, 2 * self.intermediate_size),
            (self.down_bias, self.hidden_size),
        ):
            if bias is None:
                continue
            if bias.dim() != 2 or bias.shape[1] != length or bias.dtype not in ACTIVATION_DTYPES:
                raise FormatError(
                    f"expected a bias [slots, {length}]; got {bias.dtype} {tuple(bias.shape)}"
                )
            tensors.append(bias)
        for tensor in tensors:
            if tensor.shape[0] != self.num_slots or not tensor[0].is_contiguous():
                raise FormatError(
                    f"expected {self.num_slots} slots, contiguous inside; got shape "
                    f"{tuple(tensor.shape)}, stride {tensor.stride()}"
                )


def _projection_parts(arena: Mapping[str, Tensor], projection: str, fmt: str) -> dict[str, Tensor]:
    parts = {}
    for part in part_shapes(fmt, 2, 2):
        name = part_name(projection, part)
        if name not in arena:
            raise FormatError(f"{fmt} experts need {name!r}; the arena has {sorted(arena)}")
        if arena[name].dim() < 2:
            raise FormatError(f"{name!r} needs a slot dimension; got {tuple(arena[name].shape)}")
        parts[part] = arena[name]
    return parts
