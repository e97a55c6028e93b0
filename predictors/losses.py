"""What the networks are trained by: losses over sets of experts, their weights, a curriculum.

Pure functions of tensors; knows no network.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .presets import Curriculum, Loss

FOCUS = 2.0
"""Exponent of the focal loss (Lin et al. 2017), which weighs down what is already right."""

NEWTON_STEPS = 6


def normalised(scores: Tensor, top_k: int) -> Tensor:
    """Log-odds [..., E] whose probabilities sum to top_k; gradients flow through the shift.

    The same as `calibration.inclusion`. The last Newton step is taken with the graph on: its
    derivative at the solution is that of the implicit function.
    """
    detached = scores.detach()
    edge = detached.topk(min(top_k + 1, scores.shape[-1]), dim=-1).values[..., -2:]
    shift = edge.mean(dim=-1, keepdim=True)
    slope = torch.ones_like(shift)
    for _ in range(NEWTON_STEPS):
        probability = torch.sigmoid(detached - shift)
        slope = (probability * (1.0 - probability)).sum(dim=-1, keepdim=True).clamp_min(1e-4)
        shift = shift + ((probability.sum(dim=-1, keepdim=True) - top_k) / slope).clamp(-2.0, 2.0)
    excess = torch.sigmoid(scores - shift).sum(dim=-1, keepdim=True) - top_k
    return scores - (shift + excess / slope)


def set_loss(
    scores: Tensor, used: Tensor, *, loss: Loss, top_k: int, weights: Tensor | None = None
) -> Tensor:
    """[N, L] losses of `scores` [N, L, E] against `used` [N, L, E] bool; `weights` [L, E].

    "bce" is the log loss of each expert's inclusion probability: a proper score, so that its
    minimum is calibrated, and of exactly what is reported. "softmax" is the cross-entropy to an
    equal share for each of the k, "focal" the log loss with easy experts weighed down.
    """
    target = used.to(scores.dtype)
    if loss == "softmax":
        share = target / top_k
        each = -scores.log_softmax(dim=-1) * share
    else:
        log_odds = normalised(scores, top_k)
        each = F.binary_cross_entropy_with_logits(log_odds, target, reduction="none")
        if loss == "focal":
            each = each * (torch.sigmoid(log_odds) - target).abs() ** FOCUS
    if weights is not None:
        each = torch.where(used, each * weights, each)
    return each.sum(dim=-1)


def balance(frequencies: np.ndarray) -> np.ndarray:
    """Weights [L, E] of used experts that count rare ones more: the root of mean / frequency."""
    mean = frequencies.mean(axis=1, keepdims=True)
    weights = np.sqrt(mean / np.maximum(frequencies, 0.05 * mean))
    return (weights / weights.mean(axis=1, keepdims=True)).astype(np.float32)


class PairCurriculum:
    """From frequent to rare: which (token, layer) cells an epoch learns from.

    A cell is as frequent as its layer's unordered pair of the two heaviest experts. In the first
    half of the epochs the share of cells that count grows evenly to all of them.
    """

    def __init__(self, topk_ids: np.ndarray, num_experts: int, *, epochs: int) -> None:
        pairs = np.sort(topk_ids[:, :, :2].astype(np.int64), axis=2)
        self._rank = np.empty(pairs.shape[:2], np.float32)
        self._grown = max(1, epochs // 2)
        for layer_idx in range(pairs.shape[1]):
            names = pairs[:, layer_idx, 0] * num_experts + pairs[:, layer_idx, -1]
            counts = np.bincount(names, minlength=num_experts**2)[names]
            order = np.argsort(-counts, kind="stable")
            self._rank[order, layer_idx] = np.arange(len(order)) / len(order)

    def weights(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """[N, L] float32, 1 for cells that count in `epoch` (from 0)."""
        share = min(1.0, (epoch + 1) / (self._grown + 1))
        return (self._rank[rows] < share).astype(np.float32)


def make_curriculum(
    name: Curriculum, topk_ids: np.ndarray, num_experts: int, *, epochs: int
) -> PairCurriculum | None:
    """The curriculum of that name; None where every cell always counts."""
    return PairCurriculum(topk_ids, num_experts, epochs=epochs) if name != "none" else None
