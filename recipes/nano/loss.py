"""The training losses: next-token cross-entropy that never holds all logits, and the balance of the
experts.

Know shapes only, no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 512  # logits of a chunk (512 x 4096 floats, 8 MB) stay in a CPU's last-level cache


class HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ head.T`; both gradients are made in the forward pass, chunk
    by chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = hidden[rows] @ head.T
            picked = logits.gather(1, targets[rows, None])
            probabilities = logits.sub_(logits.amax(1, keepdim=True).detach())
            shift = picked - probabilities.gather(1, targets[rows, None])
            probabilities.exp_()
            partition = probabilities.sum(1, keepdim=True)
            total += (partition.log() + shift - picked).sum()
            grad_logits = probabilities.div_(partition)
            grad_logits.scatter_add_(1, targets[rows, None], torch.full_like(picked, -1.0))
            torch.mm(grad_logits, head, out=grad_hidden[rows])
            grad_head.addmm_(grad_logits.T, hidden[rows])
        scale = 1.0 / len(hidden)
        ctx.save_for_backward(grad_hidden.mul_(scale), grad_head.mul_(scale))
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None


def head_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """hidden [T, H], head [V, H], targets [T] -> mean nats a token; differentiable once."""
    return HeadCrossEntropy.apply(hidden, head, targets)


def expert_balance(router_logits: Tensor, counts: Tensor) -> Tensor:
    """Load balancing as in Switch Transformer (Fedus et al., 2021, equations 4-6), for one layer.

    router_logits [T, E], counts [E] of the choices made -> a scalar, 1 where all experts share
    alike.
    """
    share = counts / counts.sum()
    return len(counts) * (share * router_logits.softmax(-1).mean(0)).sum()
