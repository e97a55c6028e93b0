"""One expert's block in a store: which parts it has, and filling it from a layer's fused tensors.

Knows no file and no index.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...collect.schema import ExpertKey, ModelShape
from ...kernels.quantization import FormatError, part_shapes, quantize
from ..errors import InvalidDataError
from .layout import TensorView

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
CHECKPOINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def projection_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """[output features, input features] of every projection that an expert can have."""
    hidden, intermediate = shape.hidden_size, shape.expert_size
    return {
        "gate_up_proj": (2 * intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def part_name(projection: str, part: str) -> str:
    """The view's name of one part of a quantised projection (as `kernels.expert_mlp` reads it)."""
    return projection if part == "weight" else f"{projection}.{part}"


def projection_parts(
    projection: str, size: tuple[int, int], *, fmt: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """View name -> (dtype, shape) of one projection; InvalidDataError if `fmt` cannot hold it."""
    try:
        shapes = part_shapes(fmt, *size)
    except FormatError as error:
        raise InvalidDataError(f"{projection}: {error}") from error
    return {part_name(projection, part): spec for part, spec in shapes.items()}


def block_parts(
    tensors: Mapping[str, Tensor], *, shape: ModelShape, fmt: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of everything in one expert's block: projections, then the rest.

    Raises InvalidDataError where `fmt` cannot hold matrices of this shape.
    """
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    sizes = projection_sizes(shape)
    for projection, size in sizes.items():
        if projection in tensors:
            parts |= projection_parts(projection, size, fmt=fmt)
    for name in sorted(tensors.keys() - sizes.keys()):
        parts[name] = (tensors[name].dtype, tuple(tensors[name].shape[1:]))
    return parts


def check_layer(
    layer_idx: int, tensors: Mapping[str, Tensor], *, shape: ModelShape, is_transposed: bool
) -> None:
    """Raise InvalidDataError, naming the tensor, unless a layer's fused tensors fit `shape`."""
    sizes = projection_sizes(shape)
    gates = [name for name in ("gate_up_proj", "up_proj") if name in tensors]
    if len(gates) != 1 or "down_proj" not in tensors:
        raise InvalidDataError(
            f"MoE layer {layer_idx} gives {', '.join(sorted(tensors)) or 'no tensors'}; needed are "
            "gate_up_proj (or up_proj) and down_proj"
        )
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        if name in sizes:
            size = sizes[name][::-1] if is_transposed else sizes[name]
            expected = (shape.num_experts, *size)
            fits = found == expected
        else:
            expected = f"({shape.num_experts}, ...)"
            fits = len(found) >= 2 and found[0] == shape.num_experts and 0 not in found
        if not fits:
            raise InvalidDataError(
                f"{name} of MoE layer {layer_idx} has the shape {found}, expected {expected}"
            )
        if tensor.dtype not in CHECKPOINT_DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in CHECKPOINT_DTYPES)
            raise InvalidDataError(
                f"{name} of MoE layer {layer_idx} is {tensor.dtype}, expected one of {accepted}"
            )


def fill_block(
    block: Tensor,
    views: Mapping[str, TensorView],
    tensors: Mapping[str, Tensor],
    *,
    key: ExpertKey,
    fmt: str,
    is_transposed: bool,
) -> memoryview:
    """Write one expert into `block` (uint8 [nbytes]); returns its bytes, valid until refilled.

    Bytes outside the views are left as they are: the caller gives a zeroed block. Raises
    InvalidDataError for weights that are not finite, or that `fmt` cannot express.
    """
    for name, stacked in tensors.items():
        tensor = stacked[key.expert_idx]
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise InvalidDataError(f"{name} of {_words(key)} holds NaN or infinity")
        if name not in PROJECTIONS:
            _view(block, views[name]).copy_(tensor)
            continue
        try:
            parts = quantize(tensor.mT.contiguous() if is_transposed else tensor, fmt)
        except FormatError as error:
            raise InvalidDataError(f"{name} of {_words(key)}: {error}") from error
        for part, data in parts.items():
            _view(block, views[part_name(name, part)]).copy_(data)
    return block.numpy().data


def _view(block: Tensor, view: TensorView) -> Tensor:
    return block[view.offset : view.offset + view.nbytes].view(view.dtype).view(view.shape)


def _words(key: ExpertKey) -> str:
    return f"expert {key.expert_idx} in MoE layer {key.layer_idx}"
