"""The routed experts' arithmetic for training on a CPU, as an experts implementation named
`nano_training`.

Owns one autograd function over tokens sorted by expert. Autograd's own way, indexing the fused
parameter once per expert, would allocate a gradient of the whole parameter for every expert; here
each product writes its part of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "nano_training"


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts, weighted and combined. All shapes as in DeepseekExperts: T tokens, K choices,
    S = T*K rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
    ) -> Tensor:
        num_tokens, top_k = indices.shape
        num_experts, double, hidden_size = gate_up_proj.shape
        order = torch.argsort(indices.reshape(-1), stable=True)
        token = order // top_k
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        ends = torch.bincount(indices.reshape(-1), minlength=num_experts).cumsum(0).tolist()

        rows = hidden.index_select(0, token)
        row_weights = weights.reshape(-1, 1).index_select(0, order)
        gate_up = rows.new_empty(len(order), double)
        _per_expert(ends, lambda e, s: torch.mm(rows[s], gate_up_proj[e].T, out=gate_up[s]))
        gate, up = gate_up.chunk(2, dim=-1)
        # The router's weight is applied before the second product: it is linear, and this side is
        # narrower.
        inner = F.silu(gate).mul_(up)
        weighted = inner * row_weights
        out = rows.new_empty(len(order), hidden_size)
        _per_expert(ends, lambda e, s: torch.mm(weighted[s], down_proj[e].T, out=out[s]))
        ctx.save_for_backward(
            rows, row_weights, gate_up, inner, weighted, gate_up_proj, down_proj, token, place
        )
        ctx.ends, ctx.top_k = ends, top_k
        return _combine(out, place.view(num_tokens, top_k))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, gate_up, inner, weighted, gate_up_proj, down_proj, token, place = (
            ctx.saved_tensors
        )
        ends = ctx.ends
        grad_out = grads[0].index_select(0, token)
        grad_weighted = torch.empty_like(weighted)
        grad_down = torch.zeros_like(down_proj)
        _per_expert(ends, lambda e, s: torch.mm(grad_out[s], down_proj[e], out=grad_weighted[s]))
        _per_expert(ends, lambda e, s: torch.mm(grad_out[s].T, weighted[s], out=grad_down[e]))

        grad_row_weights = (grad_weighted * inner).sum(-1)
        grad_inner = grad_weighted.mul_(row_weights)
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        half = gate.shape[-1]
        torch.mul(grad_inner, F.silu(gate), out=grad_gate_up[:, half:])
        sigmoid = torch.sigmoid(gate)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        torch.mul(grad_inner.mul_(up), slope, out=grad_gate_up[:, :half])

        grad_gate_up_proj = torch.zeros_like(gate_up_proj)
        grad_rows = torch.empty_like(rows)
        _per_expert(
            ends, lambda e, s: torch.mm(grad_gate_up[s].T, rows[s], out=grad_gate_up_proj[e])
        )
        _per_expert(ends, lambda e, s: torch.mm(grad_gate_up[s], gate_up_proj[e], out=grad_rows[s]))
        choice = place.view(-1, ctx.top_k)
        return (
            _combine(grad_rows, choice),
            None,
            grad_row_weights.index_select(0, place).view(choice.shape),
            grad_gate_up_proj,
            grad_down,
        )


def _per_expert(ends: list[int], product: Any) -> None:
    start = 0
    for expert_idx, end in enumerate(ends):
        if end > start:
            product(expert_idx, slice(start, end))
        start = end


def _combine(rows: Tensor, choice: Tensor) -> Tensor:
    """Sum of each token's K rows: rows [S, H], choice [T, K] -> [T, H]."""
    return F.embedding_bag(choice, rows, mode="sum")


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The registered function; [T, H] -> [T, H], differentiable in everything but the indices."""
    return SortedExperts.apply(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
    )


def register() -> str:
    """Registers the implementation, once or again; -> its name."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME
