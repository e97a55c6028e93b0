"""The Triton implementation: which kernels a call takes, and what it refuses.

A step of at most `MAX_GATHERED_TOKENS` tokens gathers (decode); one of more groups (prefill). The
step's size decides and not a call's, so that a step served in waves keeps its bits. Runs on CUDA
tensors, and on CPU tensors under TRITON_INTERPRET=1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from triton import knobs

from .gathered import gated_rows, matrix_rows
from .grouped_matmul import grouped_rows, tile_blocks
from .operands import Operand, operand_of
from .quantization import GROUP_SIZE
from .routing import one_slot, plan_routing
from .weighted_sum import combine
from .weights import ExpertWeights

__all__ = ["MAX_GATHERED_TOKENS", "DeviceError", "combine", "expert_outputs", "linear"]

MAX_GATHERED_TOKENS = 8
"""Tokens of a step; above, reading an expert once for all its rows pays (by calculation)."""


class DeviceError(ValueError):
    """Tensors that the Triton kernels cannot run on, or shapes that they do not take."""


def expert_outputs(
    hidden_states: Tensor,
    token_idx: Tensor,
    slot_ids: Tensor,
    weights: ExpertWeights,
    *,
    out: Tensor,
    out_rows: Tensor | None,
) -> None:
    """Write every assignment's output row; see `expert_mlp.expert_outputs`. Queues, does not wait.

    The ids are trusted: checking them would wait for the device.
    """
    hidden, inner = weights.hidden_size, weights.intermediate_size
    _check(hidden_states, weights.fmt, (hidden, inner))
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    fmt, is_transposed = weights.fmt, weights.is_transposed
    gate_up = operand_of(
        weights.gate_up, weights.gate_up_bias, fmt=fmt, is_transposed=is_transposed
    )
    down = operand_of(weights.down, weights.down_bias, fmt=fmt, is_transposed=is_transposed)
    rows = torch.arange(token_idx.shape[0], device=token_idx.device)
    targets = rows if out_rows is None else out_rows
    if hidden_states.shape[0] <= MAX_GATHERED_TOKENS:
        h = gated_rows(
            hidden_states,
            token_idx,
            slot_ids,
            gate_up,
            inner=inner,
            activation=weights.activation,
            is_concatenated=weights.is_concatenated,
        )
        matrix_rows(h, down, out=out, slot_ids=slot_ids, out_rows=targets)
        return
    blocks = tile_blocks(hidden_states, weights.fmt)
    plan = plan_routing(slot_ids, weights.num_slots, block_rows=blocks.block_m)
    h = hidden_states.new_empty((token_idx.shape[0], inner))
    sources = token_idx.long()[plan.order]
    grouped_rows(
        hidden_states,
        plan,
        gate_up,
        blocks=blocks,
        sources=sources,
        targets=rows,
        out=h,
        activation=weights.activation,
        is_concatenated=weights.is_concatenated,
    )
    targets = targets.long()[plan.order]
    grouped_rows(h, plan, down, blocks=blocks, sources=rows, targets=targets, out=out)


def linear(
    rows: Tensor,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    fmt: str,
    bias: Tensor | None,
) -> Tensor:
    """rows [T, K] by the [N, K] matrix in `parts`, plus bias -> [T, N]. Queues, does not wait."""
    _check(rows, fmt, shape[1:])
    rows = rows.contiguous()
    operand = _one_matrix(parts, bias, fmt)
    out = rows.new_empty((rows.shape[0], shape[0]))
    if rows.shape[0] <= MAX_GATHERED_TOKENS:
        if rows.shape[0]:
            matrix_rows(rows, operand, out=out)
        return out
    blocks = tile_blocks(rows, fmt)
    plan = one_slot(rows.shape[0], block_rows=blocks.block_m, device=rows.device)
    grouped_rows(
        rows, plan, operand, blocks=blocks, sources=plan.order, targets=plan.order, out=out
    )
    return out


def _one_matrix(parts: Mapping[str, Tensor], bias: Tensor | None, fmt: str) -> Operand:
    one = {name: part.unsqueeze(0) for name, part in parts.items()}
    return operand_of(one, None if bias is None else bias.unsqueeze(0), fmt=fmt)


def _check(rows: Tensor, fmt: str, widths: tuple[int, ...]) -> None:
    if rows.device.type != "cuda" and not knobs.runtime.interpret:
        raise DeviceError(
            f"the Triton kernels need CUDA tensors; got {rows.device}: use impl='cpu'"
        )
    if fmt == "nf4" and any(width % GROUP_SIZE for width in widths):
        raise DeviceError(
            f"nf4 rows of {max(widths)} and {min(widths)} weights: rows that are no multiple of "
            f"{GROUP_SIZE} have no Triton kernel; use int8 or int4"
        )
