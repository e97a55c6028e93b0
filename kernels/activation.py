"""The gated activations between an expert's two projections, by the names model configs use.

Knows pre-activations only; formulas are plain PyTorch and the truth for every kernel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CLAMPED_SWIGLU_ALPHA = 1.702
CLAMPED_SWIGLU_LIMIT = 7.0

# Config spelling -> the name used here. `clamped_swiglu` is gpt_oss' gate, which is no
# `hidden_act`.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "clamped_swiglu": "clamped_swiglu",
}
ACTIVATIONS = tuple(dict.fromkeys(_NAMES.values()))


class ActivationError(ValueError):
    """An activation that no kernel here defines."""


def canonical_activation(name: str) -> str:
    """The name in `ACTIVATIONS` of a config's `hidden_act`; ActivationError if there is none."""
    try:
        return _NAMES[name]
    except KeyError:
        raise ActivationError(
            f"no kernel for activation {name!r}; accepted: {', '.join(_NAMES)}"
        ) from None


def apply_activation(gate_up: Tensor, activation: str, *, is_concatenated: bool = True) -> Tensor:
    """Gate and multiply: [..., 2I] -> [..., I], in the dtype given (kernels hand in fp32).

    `is_concatenated`: the I gate columns come first, then the I up columns; otherwise gate and up
    alternate, gate first (gpt_oss). `clamped_swiglu` is gate * sigmoid(1.702 gate) * (up + 1) with
    gate <= 7 and -7 <= up <= 7. Raises ActivationError for an unknown name.
    """
    if is_concatenated:
        gate, up = gate_up.chunk(2, dim=-1)
    else:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    name = canonical_activation(activation)
    if name == "silu":
        return F.silu(gate) * up
    if name == "gelu":
        return F.gelu(gate) * up
    if name == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if name == "relu":
        return F.relu(gate) * up
    if name == "relu2":
        return F.relu(gate).square() * up
    gate = gate.clamp(max=CLAMPED_SWIGLU_LIMIT)
    up = up.clamp(min=-CLAMPED_SWIGLU_LIMIT, max=CLAMPED_SWIGLU_LIMIT)
    return gate * torch.sigmoid(gate * CLAMPED_SWIGLU_ALPHA) * (up + 1)
