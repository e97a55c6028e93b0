"""What each op means, in plain PyTorch: one `<op>_reference` per op, slow and easy to check by eye.

Letters: T tokens, N assignments (token, slot), K experts a token, S slots, H hidden, I
intermediate. The rule every implementation follows: inputs in the activation dtype, weights as
their exact fp32 values, everything inside an expert in fp32, its output row rounded once to the
activation dtype.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .activation import apply_activation
from .quantization import dequantize
from .weights import ExpertWeights


def linear_reference(
    hidden_states: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], *, fmt: str
) -> Tensor:
    """hidden_states [..., K] times the [N, K] matrix in `parts`, fp32 inside, rounded once."""
    weight = dequantize(parts, fmt, dtype=torch.float32, shape=shape)  # [N, K]
    return (hidden_states.float() @ weight.T).to(hidden_states.dtype)  # [..., N]


def dense_expert(weights: ExpertWeights, slot: int) -> tuple[Tensor, Tensor]:
    """One slot's weights as fp32: gate_up [2I, H] and down [H, I]."""
    hidden, intermediate = weights.hidden_size, weights.intermediate_size
    shapes = [(2 * intermediate, hidden), (hidden, intermediate)]
    dense = []
    for parts, (n, k) in zip((weights.gate_up, weights.down), shapes, strict=True):
        one = {name: part[slot] for name, part in parts.items()}
        if weights.is_transposed:
            dense.append(
                dequantize(one, weights.fmt, dtype=torch.float32, shape=(k, n)).T  # [N, K]
            )
        else:
            dense.append(dequantize(one, weights.fmt, dtype=torch.float32, shape=(n, k)))
    return dense[0], dense[1]


def expert_rows(hidden_states: Tensor, weights: ExpertWeights, slot: int) -> Tensor:
    """All of one expert's token rows [M, H] -> [M, H] in fp32, not yet rounded."""
    gate_up_proj, down_proj = dense_expert(weights, slot)
    gate_up = hidden_states.float() @ gate_up_proj.T  # [M, 2I]
    if weights.gate_up_bias is not None:
        gate_up = gate_up + weights.gate_up_bias[slot].float()
    intermediate = apply_activation(
        gate_up, weights.activation, is_concatenated=weights.is_concatenated
    )  # [M, I]
    output = intermediate @ down_proj.T  # [M, H]
    if weights.down_bias is not None:
        output = output + weights.down_bias[slot].float()
    return output


def expert_outputs_reference(
    hidden_states: Tensor, token_idx: Tensor, slot_ids: Tensor, weights: ExpertWeights
) -> Tensor:
    """Unweighted output of each assignment: [T, H], [N], [N] -> [N, H] in hidden_states' dtype."""
    rows = [
        expert_rows(hidden_states[token : token + 1], weights, slot)  # [1, H]
        for token, slot in zip(token_idx.tolist(), slot_ids.tolist(), strict=True)
    ]
    if not rows:
        return hidden_states.new_empty((0, hidden_states.shape[1]))
    return torch.cat(rows).to(hidden_states.dtype)  # [N, H]


def combine_reference(outputs: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Weighted sum over K in ascending id: each product and sum rounded to fp32, then once more."""
    order = topk_ids.argsort(dim=1, stable=True)  # [T, K]
    scales = topk_weights.float().gather(1, order)  # [T, K]
    rows = outputs.gather(1, order.unsqueeze(2).expand_as(outputs)).float()  # [T, K, H]
    total = scales[:, 0, None] * rows[:, 0]  # [T, H]
    for k in range(1, outputs.shape[1]):
        total = total + scales[:, k, None] * rows[:, k]
    return total.to(outputs.dtype)


def expert_mlp_reference(
    hidden_states: Tensor,
    slot_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    *,
    order: Tensor,
) -> Tensor:
    """A whole layer: [T, H], [T, K], [T, K] -> [T, H]; `order` [T, K] holds the expert ids."""
    num_tokens, top_k = slot_ids.shape
    token_idx = torch.arange(num_tokens).repeat_interleave(top_k)  # [T * K]
    outputs = expert_outputs_reference(hidden_states, token_idx, slot_ids.flatten(), weights)
    return combine_reference(outputs.view(num_tokens, top_k, -1), topk_weights, order)
