"""A model made ready for tracing: by outrider's own expert cache, or by PyTorch, bitsandbytes,
accelerate.

Owns the three ways in and closes them again. Knows nothing of what is recorded.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ..collect.schema import ModelShape
from ..kernels import native
from .config import EngineConfig
from .device import device_of
from .engine import DTYPES
from .errors import UsageError
from .models import adapter
from .models.checkpoint import Checkpoint, checksum, fingerprint
from .models.loading import LoadedModel, load_model, load_tokenizer, resolve_folder
from .sizes import parse_bytes
from .tier import build_tier, expert_source

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class TracedModel:
    """A model whose forward pass runs, its tokenizer, and the format its experts are held in.

    `kernels` names what computes its passes: an instruction set of the native kernels, or "torch".
    A context manager: leaving it stops what reads experts and frees their memory.
    """

    model: Any
    tokenizer: Any
    shape: ModelShape
    format: str
    name: str
    resources: ExitStack
    kernels: str = "torch"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.resources.close()


def open_traced(
    model: str | None,
    config: EngineConfig,
    *,
    load_in_4bit: bool = False,
    max_memory: Mapping[int | str, int] | None = None,
    store: Path | None = None,
    progress: Progress | None = None,
) -> TracedModel:
    """Load a model so that it can be traced; blocks until its dense weights are in memory.

    On the CPU experts come from outrider's own cache within `config.expert_memory`, so the model
    may be larger than memory. On a GPU, or with `load_in_4bit` (nf4 by bitsandbytes, experts
    included) or `max_memory` (accelerate's offload; bytes by device), PyTorch holds the weights.
    Raises OutriderError.
    """
    if load_in_4bit and max_memory:
        raise UsageError(
            "--load-in-4bit with --max-memory: weights in 4 bits cannot be offloaded by "
            "accelerate; "
            "give one of them, or --format nf4 --expert-memory SIZE for outrider's own cache"
        )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder = resolve_folder(model, revision=config.revision)
    dtype = DTYPES.get(config.dtype)
    device = device_of(config.device)
    name = model or "nano"
    if max_memory:
        return _offloaded(folder, name, dtype=dtype, max_memory=max_memory)
    loaded = load_model(
        folder, dtype=dtype, device=device, progress=_told(progress, "loading dense weights")
    )
    adapter.use_fused_attention(loaded.model)
    if load_in_4bit or device.type != "cpu":
        return _resident(loaded, name, load_in_4bit=load_in_4bit, progress=progress)
    return _cached(loaded, name, config, store=store, progress=progress)


def parse_max_memory(text: str) -> dict[int | str, int]:
    """`0:20GiB,cpu:16GiB` as bytes by device, as accelerate takes it. UsageError for
    anything else.
    """
    found: dict[int | str, int] = {}
    for part in text.split(","):
        device, separator, size = part.strip().partition(":")
        if not separator or not (device.isdigit() or device == "cpu"):
            raise UsageError(
                f"--max-memory {text!r}: {part!r} is not DEVICE:SIZE; accepted is a list such as "
                "0:20GiB,cpu:16GiB, devices being GPU numbers and cpu"
            )
        found[int(device) if device.isdigit() else device] = parse_bytes(size)
    return found


def resident_bytes(model: Any) -> int:
    """Bytes of all weights as they are held, each storage once; what is on the meta device
    is not.
    """
    tensors = [*model.parameters(), *model.buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not tensor.is_meta
    }
    return sum(storages.values())


def _cached(
    loaded: LoadedModel,
    name: str,
    config: EngineConfig,
    *,
    store: Path | None,
    progress: Progress | None,
) -> TracedModel:
    """Experts by outrider's own cache; forecasts would help no batch of whole texts, so
    none run.
    """
    source = expert_source(
        loaded, config.format, store=store, progress=_told(progress, "packing experts")
    )
    tier = build_tier(loaded, config, source=source)
    resources = ExitStack()
    resources.callback(tier.close)
    executor = tier.executor
    adapter.install(loaded.model, loaded.layers, executor.forward)
    passes = iter(range(2**63))
    decoder = loaded.model.base_model
    decoder.register_forward_pre_hook(lambda *_: executor.begin_step(next(passes), []))
    # Called after a failed pass as well, so that its look-ups are not counted with the next one's.
    decoder.register_forward_hook(lambda *_: _end(executor), always_call=True)
    return TracedModel(
        loaded.model,
        load_tokenizer(loaded.folder),
        loaded.shape,
        source.format,
        name,
        resources,
        native.isa(),
    )


def _end(executor: Any) -> None:
    executor.end_step()


def _resident(
    loaded: LoadedModel, name: str, *, load_in_4bit: bool, progress: Progress | None
) -> TracedModel:
    """All experts in the device's memory, layer after layer, so that no layer is held twice."""
    told = _told(progress, "loading experts")
    for layer in loaded.layers:
        for leaf, tensor in loaded.layer_tensors(layer.layer_idx).items():
            value = tensor.to(loaded.device, loaded.dtype).contiguous()
            adapter.set_tensor(loaded.model, f"{layer.name}.{leaf}", value)
            if load_in_4bit:
                _quantize_parameter(layer.experts, leaf)
        if told is not None:
            told(layer.layer_idx + 1, len(loaded.layers))
    if load_in_4bit:
        _quantize_linears(loaded.model)
    return TracedModel(
        loaded.model,
        load_tokenizer(loaded.folder),
        loaded.shape,
        "nf4" if load_in_4bit else _format_of(loaded.dtype),
        name,
        ExitStack(),
    )


def _quantize_parameter(module: torch.nn.Module, name: str) -> None:
    """bitsandbytes' own loading leaves fused experts as they are: they are most of the model."""
    if getattr(module, name).dim() < 3:  # biases
        return
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(module, name, quant_type="nf4")


def _quantize_linears(model: torch.nn.Module) -> None:
    """Dense linear layers but the output head as bitsandbytes' 4-bit layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized: Any = Params4bit  # its arguments are those of __new__, which checkers do not see
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child is model.get_output_embeddings():  # type: ignore[operator]
                continue
            device, dtype = child.weight.device, child.weight.dtype
            made = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = quantized(child.weight.data, requires_grad=False, quant_type="nf4")
            made.weight = weight.to(device)
            made.bias = child.bias
            setattr(parent, leaf, made)


def _offloaded(
    folder: Path, name: str, *, dtype: torch.dtype | None, max_memory: Mapping[int | str, int]
) -> TracedModel:
    """transformers' own loading, spread by accelerate over devices, host memory and a scratch
    folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    shape = _shape_of(folder)
    resources = ExitStack()
    scratch = resources.enter_context(tempfile.TemporaryDirectory(prefix="outrider-offload-"))
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        device_map="auto",
        max_memory=dict(max_memory),
        offload_folder=scratch,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    return TracedModel(
        model, load_tokenizer(folder), shape, _format_of(model.dtype), name, resources
    )


def _shape_of(folder: Path) -> ModelShape:
    """The shape and fingerprint that `load_model` gives, from the dense weights alone."""
    checkpoint = Checkpoint(folder)
    config = adapter.load_config(folder)
    model = adapter.build_on_meta(config, dtype=torch.bfloat16)
    layers = adapter.moe_layers(model)
    plan, _ = adapter.conversion_plan(model, checkpoint.tensors)
    experts = {f"{layer.name}.{leaf}" for layer in layers for leaf in layer.projections}
    names = {n for target, made in plan.items() if target not in experts for n in made.names()}
    checksums = {name: checksum(checkpoint.read(name)) for name in sorted(names)}
    return adapter.routing_shape(
        model, layers, fingerprint=fingerprint(checkpoint.config, checksums)
    )


def _format_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _told(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
