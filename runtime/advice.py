"""Whether a model fits a machine and which options suit it, from its headers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..collect.devices import DeviceMemory, batch_size_for
from ..collect.schema import ModelShape
from ..kernels.quantization import part_shapes
from .experts.layout import block_views
from .models import adapter
from .models.checkpoint import Checkpoint
from .sizes import format_bytes
from .tier import RESERVE_BYTES, RESERVED_TOKENS

_FORMATS = ("bf16", "int8", "int4")


def expert_bytes(shape: ModelShape, fmt: str) -> int:
    """Bytes of one gated expert's slot in `fmt`, padding included."""
    parts = {
        f"{name}.{part}": kind
        for name, rows, columns in (
            ("gate_up_proj", 2 * shape.expert_size, shape.hidden_size),
            ("down_proj", shape.hidden_size, shape.expert_size),
        )
        for part, kind in part_shapes(fmt, rows, columns).items()
    }
    return block_views(parts)[1]


def advise(folder: Path, *, available_bytes: int) -> dict[str, Any]:
    """Sizes of a model by format and the advised options. Reads headers, no weights.

    Raises InvalidDataError or UnsupportedModelError as loading would.
    """
    checkpoint = Checkpoint(folder)
    config = adapter.load_config(folder)
    model = adapter.build_on_meta(config, dtype=torch.bfloat16)
    layers = adapter.moe_layers(model)
    shape = adapter.routing_shape(model, layers)
    experts = {id(tensor) for layer in layers for tensor in layer.experts.parameters()}
    dense = 2 * sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in experts)
    context = min(RESERVED_TOKENS, adapter.context_length(config) or RESERVED_TOKENS)
    kv = adapter.kv_bytes_per_token(config, torch.bfloat16) * context
    room = available_bytes - dense - kv - RESERVE_BYTES
    totals = {fmt: shape.num_routed_experts * expert_bytes(shape, fmt) for fmt in _FORMATS}
    resident = next((fmt for fmt in _FORMATS if totals[fmt] <= room), None)
    text = [
        f"model      {folder}: {config.model_type}, {shape.num_moe_layers} layers of "
        f"{shape.num_experts} experts, {shape.top_k} per token",
        f"           dense {format_bytes(dense)}, KV cache {format_bytes(kv)} for {context} "
        "tokens (bf16); all experts "
        + ", ".join(f"{format_bytes(totals[fmt])} as {fmt}" for fmt in _FORMATS),
    ]
    if room < expert_bytes(shape, "int4"):
        advice = None
        text.append(
            f"           does not fit: dense weights, KV cache and reserve leave "
            f"{format_bytes(max(room, 0))} of {format_bytes(available_bytes)} for experts"
        )
    elif resident is not None:
        advice = {"format": resident, "expert_memory": "all"}
        text.append(
            f"           all experts fit as {resident}: outrider generate MODEL "
            f"--format {resident} --expert-memory all"
        )
    else:
        share = 100 * room / totals["int8"]
        advice = {"format": "int8", "expert_memory": room}
        text.append(
            f"           {share:.0f} % of the experts fit as int8: outrider generate MODEL "
            f"--format int8 --expert-memory {room // 2**20}MiB"
        )
    return {
        "path": str(folder),
        "files": len(checkpoint.files),
        "dense_bytes": dense,
        "kv_bytes": kv,
        "expert_bytes": {fmt: expert_bytes(shape, fmt) for fmt in _FORMATS},
        "experts_bytes": totals,
        "fits": advice is not None,
        "advice": advice,
        "text": text,
    }


def advise_collection(sizes: Mapping[str, Any], devices: Sequence[DeviceMemory]) -> dict[str, Any]:
    """How to collect traces from a model on this machine: device, batch size, options.

    `sizes` is what `advise` returned, `devices` the GPUs. A GPU must hold all weights, in 4 bits if
    need be; else experts pass through outrider's own cache on the CPU.
    """
    whole = sizes["dense_bytes"] + sizes["experts_bytes"]["bf16"] + RESERVE_BYTES
    four_bit = sizes["dense_bytes"] + sizes["experts_bytes"]["int4"] + RESERVE_BYTES
    for device in devices:
        free = device.total_bytes - device.used_bytes
        if min(whole, four_bit) > free:
            continue
        flags = [] if whole <= free else ["--load-in-4bit"]
        batch_size = batch_size_for("cuda", device.total_bytes)
        where = f"{device.name} ({format_bytes(device.total_bytes)})"
        return _collection("cuda", where, batch_size, flags)
    advice = sizes["advice"]
    if advice is None:
        line = "collect    the model does not fit, so no traces can be taken from it here"
        return {"fits": False, "batch_size": None, "options": [], "text": [line]}
    room = advice["expert_memory"]
    # Traces tell how the model as published routes: the experts stay in the checkpoint's format.
    flags = ["--device", "cpu"] if devices else []
    flags += [] if room == "all" else ["--expert-memory", f"{room >> 20}MiB"]
    return _collection("cpu", "the CPU", batch_size_for("cpu", 0), flags)


def _collection(device: str, where: str, batch_size: int, flags: list[str]) -> dict[str, Any]:
    command = " ".join(["outrider collect MODEL --datasets offline --out DIR", *flags])
    return {
        "fits": True,
        "device": device,
        "batch_size": batch_size,
        "options": flags,
        "text": [f"collect    batch size {batch_size} on {where}: {command}"],
    }
