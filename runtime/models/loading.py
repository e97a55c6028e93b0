"""From a folder or hub id to a model whose dense weights are loaded and whose experts are not.

Peak memory is the dense weights and one tensor (one layer's experts where a store is packed).
Knows no slots and no budget.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ...collect.schema import ModelShape
from ..errors import InvalidDataError
from . import adapter
from .adapter import Conversion, MoeLayer
from .checkpoint import Checkpoint, checksum, fingerprint, read_object
from .checkpoint_experts import CheckpointExperts, in_place_obstacle
from .dense import QuantizedLinear, quantize_linears, replace_half_linears

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# What transformers leaves unsaid as well: rotary tables of old checkpoints.
_IGNORED_NAMES = re.compile(r"rotary_emb\.inv_freq$")
_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run but for its experts, and what is known of those."""

    folder: Path
    checkpoint: Checkpoint
    config: Any
    model: Any
    layers: list[MoeLayer]
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    dense_bytes: int
    end_token_ids: frozenset[int]
    plan: Mapping[str, Conversion]
    checksums: Mapping[str, int]
    unused_tensors: tuple[str, ...]

    def experts_in_place(self) -> CheckpointExperts:
        """The experts as they lie in the checkpoint. InvalidDataError if one is damaged."""
        return CheckpointExperts(self.checkpoint, self.layers, plan=self.plan, shape=self.shape)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts in the checkpoint."""
        targets = (f"{layer.name}.{name}" for layer in self.layers for name in layer.projections)
        plans = [self.plan[target] for target in targets if target in self.plan]
        return sum(self.checkpoint.tensors[name].nbytes for plan in plans for name in plan.names())

    def in_place_obstacle(self) -> str | None:
        """Why `experts_in_place` cannot serve this checkpoint, or None."""
        return in_place_obstacle(self.checkpoint, self.layers, self.plan)

    def layer_tensors(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """One layer's fused expert parameters [E, ...] as transformers makes them. Blocks."""
        layer = self.layers[layer_idx]
        tensors: dict[str, torch.Tensor] = {}
        for name in layer.projections:
            target = f"{layer.name}.{name}"
            if target not in self.plan:
                raise InvalidDataError(f"{self.folder}: no tensor makes up {target!r}")
            converted = self.plan[target].convert(self.checkpoint.read, model=self.model)
            tensors[name] = converted[target]
        return tensors

    def weights_fingerprint(self, progress: Progress | None = None) -> str:
        """Identity of every byte of the weights: a store is packed from these and no others.

        Reads the experts once, so it blocks for as long as that takes. `shape.fingerprint` covers
        the dense weights alone, which decide the routing and are read at load anyway.
        """
        names = [name for name in self.checkpoint.tensors if name not in self.checksums]
        checksums = dict(self.checksums)
        for done, name in enumerate(names):
            checksums[name] = checksum(self.checkpoint.read(name))
            if progress is not None:
                progress(done + 1, len(names))
        return fingerprint(self.checkpoint.config, checksums)


def resolve_folder(model: str | None, *, revision: str | None = None) -> Path:
    """The local folder of a model: the built-in one, a path, or a hub id (downloaded, cached).

    Blocks on the network for a hub id that is not cached; honours HF_HOME and HF_HUB_OFFLINE.
    """
    if model is None or model == "nano":
        return Path(str(files("outrider.runtime.models") / "nano"))
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise InvalidDataError(
            f"model {model!r} is neither a folder nor in the local hub cache, and the hub cannot "
            "be reached (or HF_HUB_OFFLINE is set); give a folder, or set HF_HOME to a cache that "
            "holds it"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InvalidDataError(
            f"model {model!r} (revision {revision or 'main'}) cannot be had from the hub: "
            f"{str(error).splitlines()[0]}; for a gated model set HF_TOKEN"
        ) from error


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    dense_format: str = "same",
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the dense weights of a model folder. Blocks; `progress(done_bytes, total_bytes)`.

    `dtype` is what the dense weights are computed in (None: as the checkpoint has them).
    `dense_format` is what they are kept in: "same", or a format of `dense.quantize_linears`.
    Raises UnsupportedModelError or InvalidDataError naming file and tensor.
    """
    device = device or torch.device("cpu")
    checkpoint = Checkpoint(folder)
    generation = _generation_settings(folder)
    config = adapter.load_config(folder)
    dtype = dtype or _checkpoint_dtype(checkpoint, config)
    model = adapter.build_on_meta(config, dtype=dtype)
    layers = adapter.moe_layers(model)
    shape = adapter.routing_shape(model, layers)
    plan, unexpected = adapter.conversion_plan(model, checkpoint.tensors)
    adapter.materialize_buffers(model, device=device)
    expert_targets = {f"{layer.name}.{name}" for layer in layers for name in layer.projections}
    quantized: dict[str, QuantizedLinear] = {}
    if dense_format != "same":
        kept = adapter.tied_names(model) | {
            name for name in plan if adapter.wanted_dtype(model, name, dtype=dtype) != dtype
        }
        quantized = quantize_linears(model, layers, fmt=dense_format, kept=kept)
    if device.type == "cpu":
        replace_half_linears(model)
    checksums = _load_dense(
        model,
        checkpoint,
        [conversion for target, conversion in plan.items() if target not in expert_targets],
        quantized=quantized,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    model.tie_weights()
    unfilled = [name for name, module in quantized.items() if not module.parts]
    _refuse_missing(model, expert_targets, unfilled, folder=folder)
    return LoadedModel(
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        model=model,
        layers=layers,
        shape=replace(shape, fingerprint=fingerprint(checkpoint.config, checksums)),
        dtype=dtype,
        device=device,
        dense_bytes=_dense_bytes(model),
        end_token_ids=adapter.end_token_ids(config, generation),
        plan=plan,
        checksums=checksums,
        unused_tensors=tuple(name for name in unexpected if not _IGNORED_NAMES.search(name)),
    )


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises InvalidDataError if there is none. Never runs its code."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        # Without its files some families' tokenizer is made all the same, with no vocabulary.
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("it has no vocabulary")
    except Exception as error:  # the tokenizers library raises the base class itself
        raise InvalidDataError(
            f"{folder}: no usable tokenizer (tokenizer.json and tokenizer_config.json): "
            f"{adapter.one_line(error)}; copy the tokenizer files of the model there"
        ) from error
    return tokenizer


def _generation_settings(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    settings = read_object(path)
    ends = settings.get("eos_token_id")
    if any(type(end) is not int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise InvalidDataError(
            f"{path}: eos_token_id is {ends!r}; wanted is a token id or a list of them"
        )
    return settings


def _checkpoint_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for record in checkpoint.tensors.values():
        counts[record.dtype] = counts.get(record.dtype, 0) + record.nbytes
    if getattr(config, "quantization_config", None) is not None:
        # The scales of encoded weights say nothing about what they are decoded to.
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    floats = {torch.float32, torch.bfloat16, torch.float16} & counts.keys()
    if not floats:
        raise InvalidDataError(f"{checkpoint.folder}: no tensor is float32, bfloat16 or float16")
    return max(floats, key=lambda dtype: counts[dtype])


def _load_dense(
    model: Any,
    checkpoint: Checkpoint,
    conversions: list[Conversion],
    *,
    quantized: Mapping[str, QuantizedLinear],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, int]:
    checksums: dict[str, int] = {}
    total = sum(checkpoint.tensors[name].nbytes for c in conversions for name in c.names())
    done = 0

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.read(name)
        checksums[name] = checksum(tensor)
        return tensor

    for conversion in conversions:
        for name, value in conversion.convert(read, model=model).items():
            is_plain = name not in quantized
            wanted = adapter.wanted_dtype(model, name, dtype=dtype) if is_plain else dtype
            try:
                _check_kind(value, wanted)
                if is_plain:
                    adapter.set_tensor(model, name, value.to(device, wanted).contiguous())
                else:
                    quantized[name].hold(value.to(device))
            except InvalidDataError as error:
                source = checkpoint.tensors[conversion.names()[0]]
                raise InvalidDataError(f"{source.file}: {source.name!r}: {error}") from error
        done += sum(checkpoint.tensors[name].nbytes for name in conversion.names())
        if progress is not None:
            progress(done, total)
    return checksums


def _check_kind(value: torch.Tensor, wanted: torch.dtype) -> None:
    if wanted.is_floating_point and value.dtype not in _READABLE:
        raise InvalidDataError(
            f"the tensor is {value.dtype}; dense weights are read as float32, bfloat16 or float16, "
            "and encoded ones by the quantization_config in config.json"
        )


def _refuse_missing(
    model: Any, expert_targets: set[str], unfilled: list[str], *, folder: Path
) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    plain = (name for name, tensor in tensors if tensor.is_meta and name not in expert_targets)
    missing = sorted([*plain, *unfilled])
    if missing:
        raise InvalidDataError(
            f"{folder}: no tensor of the checkpoint makes up {missing[0]!r} ({len(missing)} such); "
            "a shard is missing or config.json belongs to another model"
        )


def _dense_bytes(model: Any) -> int:
    every = [*model.parameters(), *model.buffers()]
    tensors = {tensor.data_ptr(): tensor for tensor in every if not tensor.is_meta}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
