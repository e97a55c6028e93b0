"""Model shapes for simulation: sizes, bytes by format, and times on a device.

Shapes come from a data file or from a model's own config.json; no weights are looked at.
"""

import json
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from ..collect.schema import ModelShape
from ..runtime.errors import InvalidDataError, UsageError
from .devices import Device
from .replay import Carriage, StepTimes

BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "int4": 4.0, "nf4": 4.0}
# int8: one fp32 scale a row of a thousand or more weights. int4: bf16 scale and minimum for each
# group of 64. nf4: one fp32 scale a block of 64.
_SCALE_BITS = {"int8": 0.03, "int4": 0.5, "nf4": 0.5}


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of a decoder of which `layers - dense_layers` have routed experts.

    All parameters are counted but biases and norms. `attention_parameters` (a layer) and
    `kv_values` (a token and layer) stand where attention is not of the usual form.
    """

    title: str
    source: str
    layers: int
    dense_layers: int
    dense_size: int
    hidden_size: int
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    attention_parameters: int = 0
    kv_values: int = 0

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def moe_dense_parameters(self) -> int:
        """Of one MoE layer without its routed experts."""
        shared = 3 * self.hidden_size * self.shared_size
        return self._attention + shared + self.num_experts * self.hidden_size

    @property
    def dense_layer_parameters(self) -> int:
        """Of one layer without experts."""
        return self._attention + 3 * self.hidden_size * self.dense_size

    @property
    def head_parameters(self) -> int:
        """Of the output head; the embedding is as large again and not read."""
        return self.hidden_size * self.vocab_size

    @property
    def dense_parameters(self) -> int:
        """Everything but routed experts, embedding and head apart."""
        layers = self.moe_layers * self.moe_dense_parameters
        layers += self.dense_layers * self.dense_layer_parameters
        return layers + 2 * self.head_parameters

    @property
    def active_dense_parameters(self) -> int:
        """What one token reads apart from its routed experts."""
        return self.dense_parameters - self.head_parameters

    @property
    def _attention(self) -> int:
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.attention_parameters or self.hidden_size * heads

    def expert_bytes(self, fmt: str) -> float:
        """One expert in `fmt`, scales included, padding left out. UsageError for an unknown one."""
        return self.expert_parameters * bits(fmt) / 8.0

    def kv_bytes(self, context_tokens: int) -> int:
        """KV cache of one sequence in bf16."""
        values = self.kv_values or 2 * self.kv_heads * self.head_dim
        return 2 * values * self.layers * context_tokens

    def shape(self) -> ModelShape:
        """The identity that routing is recorded under, without a fingerprint."""
        return ModelShape(
            self.moe_layers,
            self.num_experts,
            self.top_k,
            self.hidden_size,
            self.expert_size,
            "",
        )


def bits(fmt: str) -> float:
    """Bits a weight in `fmt`, scales included."""
    if fmt not in BITS:
        raise UsageError(f"format {fmt!r} is unknown; known ones: {', '.join(BITS)}")
    return BITS[fmt] + _SCALE_BITS.get(fmt, 0.0)


def step_times(geometry: Geometry, device: Device, *, fmt: str) -> StepTimes:
    """Seconds of a decode step at batch 1 and short context, dense weights in bf16.

    The longer of reading the weights and of two operations a weight, and the device's overheads.
    """

    def seconds(parameters: float, weight_bits: float) -> float:
        read = parameters * weight_bits / 8.0 / device.memory_bytes_per_s
        return max(read, 2.0 * parameters / device.flop_per_s)

    layer_s = 1e-6 * device.layer_us
    dense_s = seconds(geometry.dense_layer_parameters, 16.0) + layer_s
    return StepTimes(
        begin_s=geometry.dense_layers * dense_s,
        layer_s=seconds(geometry.moe_dense_parameters, 16.0) + layer_s + 1e-6 * device.sync_us,
        expert_s=seconds(geometry.expert_parameters, bits(fmt)),
        end_s=seconds(geometry.head_parameters, 16.0) + 1e-6 * device.token_us,
    )


def carriage(geometry: Geometry, device: Device, *, fmt: str) -> Carriage:
    """What bringing one expert of `geometry` over the device's link costs."""
    return Carriage(
        expert_bytes=round(geometry.expert_bytes(fmt)),
        link_bytes_per_s=device.link_bytes_per_s,
        latency_s=1e-6 * device.latency_us,
    )


@cache
def model_shapes() -> dict[str, Geometry]:
    """All known shapes by name."""
    text = files("outrider.bench").joinpath("model_shapes.toml").read_text(encoding="utf-8")
    return {name: msgspec.convert(one, Geometry) for name, one in tomllib.loads(text).items()}


def find_geometry(name: str) -> Geometry:
    """A known shape, or that of a config.json or of the folder it is in. No weights are read.

    UsageError for neither; InvalidDataError for a config that is no mixture of experts.
    """
    if name in model_shapes():
        return model_shapes()[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"model shape {name!r} is neither a known one ({', '.join(model_shapes())}) nor a "
            "config.json or a folder with one"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidDataError(f"{path}: expected an object, found {type(config).__name__}")
    return geometry_of(config, source=str(path))


def geometry_of(config: dict[str, Any], *, source: str) -> Geometry:
    """The sizes that a config.json states. InvalidDataError names the field that is missing."""

    def value(*names: str, default: int | None = None) -> int:
        for name in names:
            found = config.get(name)
            if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
                return found
        if default is None:
            raise InvalidDataError(
                f"{source}: no {' or '.join(names)} that is a whole number: not the config of a "
                "mixture-of-experts model that outrider knows"
            )
        return default

    layers, hidden = value("num_hidden_layers"), value("hidden_size")
    heads = value("num_attention_heads")
    expert_size = value("moe_intermediate_size", "intermediate_size")
    dense_size = value("intermediate_size", default=0)
    experts = value("n_routed_experts", "num_experts", "num_local_experts")
    shared = value("shared_expert_intermediate_size", default=0)
    shared = shared or expert_size * value("n_shared_experts", default=0)
    head_dim = value("head_dim", default=hidden // max(heads, 1))
    attention, kv_values = _latent_attention(value, hidden=hidden, heads=heads)
    return Geometry(
        title=str(config.get("_name_or_path") or config.get("model_type") or source),
        source=source,
        layers=layers,
        dense_layers=_dense_layers(config, value, layers=layers),
        dense_size=dense_size,
        hidden_size=hidden,
        num_experts=experts,
        top_k=value("num_experts_per_tok"),
        expert_size=expert_size,
        shared_size=shared,
        heads=heads,
        kv_heads=value("num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocab_size=value("vocab_size"),
        attention_parameters=attention,
        kv_values=kv_values,
    )


def _dense_layers(config: dict[str, Any], value: Any, *, layers: int) -> int:
    first = value("first_k_dense_replace", default=0)
    stride = max(1, value("decoder_sparse_step", "moe_layer_freq", default=1))
    only = config.get("mlp_only_layers") or []
    sparse = [
        index
        for index in range(first, layers)
        if index not in only
        and ((index + 1) if "decoder_sparse_step" in config else index) % stride == 0
    ]
    return layers - len(sparse)


def _latent_attention(value: Any, *, hidden: int, heads: int) -> tuple[int, int]:
    """Parameters a layer and cached values a token where keys and values are kept compressed."""
    rank = value("kv_lora_rank", default=0)
    if not rank:
        return 0, 0
    nope, rope = value("qk_nope_head_dim"), value("qk_rope_head_dim")
    per_value, query_rank = value("v_head_dim"), value("q_lora_rank", default=0)
    query = heads * (nope + rope)
    parameters = query_rank * (hidden + query) if query_rank else hidden * query
    parameters += hidden * (rank + rope) + rank * heads * (nope + per_value)
    return parameters + heads * per_value * hidden, rank + rope


def geometry_for(shape: ModelShape) -> Geometry:
    """The known shape that traces fit, else one made of what traces say.

    Then attention is taken for four square matrices and the output head for nothing, since traces
    do not tell: times are too short by the head's.
    """
    for known in model_shapes().values():
        own = known.shape()
        if all(
            getattr(own, name) == getattr(shape, name)
            for name in ModelShape.__slots__
            if name != "fingerprint"
        ):
            return known
    return Geometry(
        title=f"{shape.num_moe_layers} layers of {shape.num_experts} experts, top {shape.top_k}",
        source="the traces' manifest; attention assumed square, head unknown",
        layers=shape.num_moe_layers,
        dense_layers=0,
        dense_size=0,
        hidden_size=shape.hidden_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_size=shape.expert_size,
        shared_size=0,
        heads=1,
        kv_heads=1,
        head_dim=shape.hidden_size,
        vocab_size=0,
    )
