"""Everything that touches the insides of transformers, so that one file breaks when they change.

Builds a model on the meta device, says which of its modules are routers and experts, plans how
checkpoint tensors become parameters, rebuilds buffers, and puts our experts function in place.
Knows neither files nor slots. Tested at the lowest and the newest version allowed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ...collect.schema import ModelShape
from ..errors import InvalidDataError, UnsupportedModelError
from . import deepseek, encoding

EXPERTS_IMPLEMENTATION = "outrider"
_MAX_SHOWN = 300
# (layer_idx, experts module, hidden_states [T, H], topk_ids [T, K], topk_weights [T, K]) -> [T, H]
ExpertsFunction = Callable[
    [int, torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One Mixture-of-Experts layer: its modules and the names of its fused expert parameters."""

    layer_idx: int
    name: str
    experts: Any
    router: Any
    projections: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        """Routed experts of this layer."""
        return getattr(self.experts, self.projections[0]).shape[0]


@dataclass(slots=True)
class Conversion:
    """How one parameter (or several) is made from checkpoint tensors.

    `sources` maps each pattern of the converter to the checkpoint names it collected, in the
    order in which they are merged.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Checkpoint names that this conversion reads."""
        return [name for names in self.sources.values() for name in names]

    def concatenated_sources(self) -> list[list[str]] | None:
        """Names per row block if each expert's slice is its source tensors one below the other.

        `[[gate 0, gate 1, ...], [up 0, up 1, ...]]`, or a single list for down; None if the
        conversion does anything else than stack experts and concatenate rows, so that an expert's
        bytes do not lie in the checkpoint as they are computed with.
        """
        if self.converter is None:
            return None
        operations = self.converter.operations
        is_stack = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        if len(operations) == 1 and is_stack and len(self.sources) == 1:
            return list(self.sources.values())
        if len(operations) == 2 and is_stack:
            concatenate = operations[1]
            if isinstance(concatenate, Concatenate) and concatenate.dim == 1:
                patterns = self.converter.source_patterns
                if all(pattern in self.sources for pattern in patterns):
                    return [self.sources[pattern] for pattern in patterns]
        return None

    def convert(
        self, read: Callable[[str], torch.Tensor], *, model: torch.nn.Module
    ) -> dict[str, torch.Tensor]:
        """Read the sources and give the parameters by name. Holds all of them in memory at once."""
        if self.converter is None:
            (name,) = self.names()
            return {self.target: read(name)}
        # Any: transformers collects futures here while loading, and tensors while saving.
        converter: Any = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            converter.collected_tensors[pattern] = [read(name) for name in names]
        converted = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


def load_config(folder: Path) -> Any:
    """The model's configuration. Never runs code from the folder.

    Raises UnsupportedModelError for a family that transformers does not know.
    """
    deepseek.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family checks its fields in its own way
        raise UnsupportedModelError(f"{folder}: config.json: {one_line(error)}") from error
    text_config = config.get_text_config()
    if text_config is not config:
        raise UnsupportedModelError(
            f"{folder}: {config.model_type!r} is a multi-modal model; outrider runs text decoders"
        )
    return config


def build_on_meta(config: Any, *, dtype: torch.dtype) -> Any:
    """The causal language model with every parameter and buffer on the meta device."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # sizes that make no tensor, activations that nobody knows
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot be built from this config.json: {one_line(error)}"
        ) from error
    return model.eval()


def use_fused_attention(model: Any) -> None:
    """Let transformers' own attention be PyTorch's fused one where the family has it.

    For models that run without RaggedAttention: written out, products of bf16 take twice the time
    of the whole pass on processors without bf16 arithmetic.
    """
    if model._supports_sdpa:
        model.config._attn_implementation = "sdpa"


def moe_layers(model: Any) -> list[MoeLayer]:
    """The Mixture-of-Experts layers in the order they run.

    Raises UnsupportedModelError for models without experts, or whose experts do not go through
    transformers' experts interface, or differ from layer to layer.
    """
    layers: list[MoeLayer] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")):
            continue
        parent = modules[name.rpartition(".")[0]]
        projections = tuple(parameter for parameter, _ in module.named_parameters(recurse=False))
        router = _router_of(parent, num_experts=getattr(module, projections[0]).shape[0])
        layers.append(MoeLayer(len(layers), name, module, router, projections))
    if not layers:
        raise UnsupportedModelError(
            f"{model.config.model_type!r} has no Mixture-of-Experts layers that go through "
            "transformers' experts interface, so there is nothing to fetch ahead"
        )
    for layer in layers:
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{model.config.model_type!r} normalises each expert's output with weights that "
                "outrider does not keep with the expert"
            )
        if layer.num_experts != layers[0].num_experts or layer.projections != layers[0].projections:
            raise UnsupportedModelError(
                f"{model.config.model_type!r}: layers {layers[0].name} and {layer.name} have "
                "different experts; slots of one size cannot hold both"
            )
    return layers


def _router_of(parent: torch.nn.Module, *, num_experts: int) -> Any:
    for child in parent.children():
        weight = getattr(child, "weight", None)
        shape = weight.shape if isinstance(weight, torch.Tensor) else ()
        if hasattr(child, "top_k") and len(shape) == 2 and shape[0] == num_experts:
            return child
    return None


def routing_shape(model: Any, layers: list[MoeLayer], *, fingerprint: str = "") -> ModelShape:
    """The ModelShape of a model built by `build_on_meta`."""
    config = model.config
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    if top_k is None and layers[0].router is not None:
        top_k = layers[0].router.top_k
    if top_k is None:
        raise UnsupportedModelError(f"{config.model_type!r}: experts per token are not in config")
    down = getattr(layers[0].experts, "down_proj", None)
    if down is None:
        raise UnsupportedModelError(f"{config.model_type!r}: experts have no down_proj")
    if not 1 <= top_k <= layers[0].num_experts:
        raise InvalidDataError(
            f"config.json asks for {top_k} experts per token and has {layers[0].num_experts}"
        )
    is_transposed = layers[0].experts.is_transposed
    return ModelShape(
        num_moe_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=int(top_k),
        hidden_size=config.hidden_size,
        expert_size=down.shape[1] if is_transposed else down.shape[2],
        fingerprint=fingerprint,
    )


def conversion_plan(model: Any, names: Iterable[str]) -> tuple[dict[str, Conversion], list[str]]:
    """Sort checkpoint tensor names into conversions by target parameter.

    Returns them and the names that no parameter wants. The order inside a conversion is the
    natural one of the names (expert 2 before expert 10), as transformers has it.
    """
    mapping = get_model_conversion_mapping(model, hf_quantizer=encoding.decoder(model.config))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    state = model.state_dict()
    plan: dict[str, Conversion] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unexpected.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        conversion = plan.setdefault(target, Conversion(target, converter))
        conversion.sources.setdefault(pattern or name, []).append(name)
    return plan, unexpected


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def set_tensor(model: Any, name: str, value: torch.Tensor) -> None:
    """Replace a meta parameter or persistent buffer; InvalidDataError if the shape is another."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    current = getattr(module, leaf)
    if current.shape != value.shape:
        raise InvalidDataError(
            f"tensor for {name!r} has shape {list(value.shape)}, the configuration wants "
            f"{list(current.shape)}; config.json and weights do not belong together"
        )
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def wanted_dtype(model: Any, name: str, *, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter is computed in: `dtype`, but for what the family keeps in fp32.

    Whole numbers stay what they are.
    """
    module_name, _, leaf = name.rpartition(".")
    current = getattr(model.get_submodule(module_name), leaf)
    if not current.is_floating_point():
        return current.dtype
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern, name):
            return kept
    return dtype


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are one tensor with another: output head and embedding, mostly."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {*pairs.keys(), *pairs.values()}


def materialize_buffers(model: Any, *, device: torch.device) -> None:
    """Compute the non-persistent buffers (rotary frequencies) that no checkpoint holds.

    They are poisoned first; a buffer that the family's own initialisation leaves alone is an
    UnsupportedModelError rather than garbage in every token.
    """
    persistent = model.state_dict().keys()
    owners: dict[torch.nn.Module, list[str]] = {}
    for name, buffer in list(model.named_buffers()):
        if name in persistent or not buffer.is_meta:
            continue
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        fill = float("nan") if buffer.is_floating_point() else 0
        module._buffers[leaf] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device)
        owners.setdefault(module, []).append(leaf)
    for module, leaves in owners.items():
        with torch.device(device), torch.no_grad():
            model._init_weights(module)
        for leaf in leaves:
            if module.get_buffer(leaf).isnan().any():
                raise UnsupportedModelError(
                    f"{model.config.model_type!r}: buffer {leaf!r} of {type(module).__name__} is "
                    "not in checkpoints and transformers does not rebuild it"
                )


def install(model: Any, layers: list[MoeLayer], function: ExpertsFunction) -> None:
    """Have every experts module of this model call `function`; other models are not touched."""
    for layer in layers:
        layer.experts.outrider_function = function
        layer.experts.outrider_layer_idx = layer.layer_idx
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _dispatch)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


def calls(layers: list[MoeLayer], function: ExpertsFunction) -> bool:
    """Whether every experts module calls `function`, and nobody stands before it."""
    return all(layer.experts.outrider_function == function for layer in layers)


def _dispatch(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    return self.outrider_function(
        self.outrider_layer_idx, self, hidden_states, top_k_index, top_k_weights
    )


def activation(layer: MoeLayer) -> str | None:
    """The activation by its configuration name, or None if the family has one of its own."""
    if type(layer.experts)._apply_gate is not _default_apply_gate:
        return None
    return getattr(layer.experts.config, "hidden_act", None)


def router_gate(layer: MoeLayer) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """A router's weight [E, H] and selection bias [E], for look-ahead without firing its hooks."""
    if layer.router is None:
        return None
    bias = getattr(layer.router, "bias", None)
    if bias is None:
        bias = getattr(layer.router, "e_score_correction_bias", None)
    return layer.router.weight, bias if isinstance(bias, torch.Tensor) else None


def router_scoring(layer: MoeLayer) -> str:
    """How scores become weights: "sigmoid" for routers with a correction bias, else "softmax"."""
    return "sigmoid" if hasattr(layer.router, "e_score_correction_bias") else "softmax"


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers, as `SequenceKv` keeps them."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        # Multi-head latent attention caches the expanded heads, as transformers does.
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        per_layer = heads * (key + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_layer = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    return config.num_hidden_layers * per_layer * dtype.itemsize


def context_length(config: Any) -> int | None:
    """Most positions the model was made for, or None where the configuration does not say."""
    return getattr(config, "max_position_embeddings", None)


def end_token_ids(config: Any, generation: Mapping[str, Any]) -> frozenset[int]:
    """Token ids that end a text, from generation_config.json first, else config.json."""
    ends = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def one_line(error: BaseException) -> str:
    """What an error of transformers says, as one line that fits a message."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{type(error).__name__}: {shown}" if isinstance(error, KeyError) or not text else shown
