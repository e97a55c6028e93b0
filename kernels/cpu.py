"""The CPU implementation: native code where it was built, else PyTorch one expert at a time."""

import torch
from torch import Tensor

from . import native
from .reference import combine_reference, expert_rows
from .ways import Way
from .weights import ExpertWeights


def expert_outputs(
    hidden_states: Tensor,
    token_idx: Tensor,
    slot_ids: Tensor,
    weights: ExpertWeights,
    *,
    out: Tensor,
    out_rows: Tensor | None,
    way: Way = Way.BY_COUNT,
) -> None:
    """Write every assignment's output row; see `expert_mlp.expert_outputs`."""
    if native.serves(weights):
        native.expert_outputs(
            hidden_states,
            token_idx,
            slot_ids,
            weights,
            out=out,
            out_rows=out_rows,
            num_threads=torch.get_num_threads(),
            way=way,
        )
        return
    rows = torch.arange(token_idx.shape[0]) if out_rows is None else out_rows.long()
    for slot in slot_ids.unique().tolist():
        chosen = (slot_ids == slot).nonzero().squeeze(1)
        tokens = hidden_states[token_idx[chosen].long()]  # [M, H]
        out[rows[chosen]] = expert_rows(tokens, weights, slot).to(out.dtype)


def combine(outputs: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """See `expert_mlp.combine`."""
    if not native.is_available():
        return combine_reference(outputs, topk_weights, topk_ids)
    out = outputs.new_empty((outputs.shape[0], outputs.shape[2]))
    native.combine(
        outputs.contiguous(),
        topk_weights.float().contiguous(),
        topk_ids.long().contiguous(),
        out=out,
    )
    return out
