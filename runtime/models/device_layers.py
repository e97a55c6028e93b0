"""The parts of a decoder of Llama's form as a device computes them, taken from its modules.

Linear layers of the same inputs become one matrix, of which the modules then use their share. Knows
modules and what kernels want; computes nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.activation import ActivationError, canonical_activation
from ...kernels.decode_attention import Heads
from ...kernels.operands import Operand, operand_of
from ...kernels.router import ChoiceRule
from .dense import FORMATS, stack_weights
from .llama_form import choice_rule, num_kv_heads, shared_experts


class NotServedError(Exception):
    """A part that is not computed here as it is."""


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    norm: Norm
    qkv: Operand
    heads: Heads
    output: Operand


@dataclass(frozen=True, slots=True)
class Mlp:
    gate_up: Operand
    down: Operand
    inner: int
    activation: str
    gate: Operand | None = None


@dataclass(frozen=True, slots=True)
class Routed:
    router: Operand
    rule: ChoiceRule
    module: Any


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """`mlp` is the block of a dense layer, of others the shared experts."""

    attention: AttentionBlock
    norm: Norm
    mlp: Mlp | None
    routed: Routed | None


def norm_of(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def stacked(*modules: Any) -> Operand:
    """Linear layers of the same inputs as one matrix, their outputs one behind the other."""
    stacked = stack_weights(modules)
    if stacked is None:
        raise NotServedError
    parts, fmt = stacked
    bias = None
    if any(module.bias is not None for module in modules):
        bias = torch.cat(
            [
                module.bias
                if module.bias is not None
                else parts["weight"].new_zeros(module.out_features, dtype=torch.float32)
                for module in modules
            ]
        )
    one = {name: part.unsqueeze(0) for name, part in parts.items()}
    return operand_of(one, None if bias is None else bias.unsqueeze(0), fmt=fmt)


def layer_of(layer: Any, config: Any) -> DeviceLayer:
    module = layer.self_attn
    query_norm, key_norm = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    heads = Heads(
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=module.head_dim,
        scaling=module.scaling,
        window=getattr(config, "sliding_window", None) or 0,
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        eps=0.0 if query_norm is None else query_norm.variance_epsilon,
    )
    attention = AttentionBlock(
        norm_of(layer.input_layernorm),
        stacked(module.q_proj, module.k_proj, module.v_proj),
        heads,
        stacked(module.o_proj),
    )
    norm, block = norm_of(layer.post_attention_layernorm), layer.mlp
    if hasattr(block, "gate_proj"):
        return DeviceLayer(attention, norm, _mlp(block, config), None)
    shared, gate = shared_experts(block)
    weight = block.gate.weight
    if weight.dtype not in FORMATS:
        raise NotServedError
    router = operand_of({"weight": weight.unsqueeze(0)}, None, fmt=FORMATS[weight.dtype])
    return DeviceLayer(
        attention,
        norm,
        None if shared is None else _mlp(shared, config, gate),
        Routed(router, choice_rule(block.gate, config), block.experts),
    )


def _mlp(module: Any, config: Any, gate: Any = None) -> Mlp:
    try:
        activation = canonical_activation(config.hidden_act)
    except ActivationError as error:
        raise NotServedError from error
    return Mlp(
        stacked(module.gate_proj, module.up_proj),
        stacked(module.down_proj),
        inner=module.gate_proj.out_features,
        activation=activation,
        gate=None if gate is None else stacked(gate),
    )
