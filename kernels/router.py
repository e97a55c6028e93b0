"""A router's choice of experts, by native code: softmax, the largest, their weights.

Ties for the last place are left to `torch.topk`, as in the families' own modules. Knows logits; no
experts, no model.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .native import DTYPE_IDS, Matrix
from .product import Product


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """What a family's router makes of its logits.

    Softmax in fp32, of which `rounds_scores` leaves what the gate's dtype holds; the `top_k`
    largest; with `is_renormalised` each divided by their sum and `epsilon`; `rounds_weights` gives
    weights in the gate's dtype, else they are fp32.
    """

    top_k: int
    is_renormalised: bool
    rounds_scores: bool = False
    rounds_weights: bool = True
    epsilon: float = 0.0


class RouterDescriptor(ctypes.Structure):
    """`Router` of csrc/decoder.h."""

    _fields_ = (
        ("gate", Matrix),
        ("top_k", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("format", ctypes.c_int32),
        ("rounds_scores", ctypes.c_int32),
        ("rounds_weights", ctypes.c_int32),
        ("is_renormalised", ctypes.c_int32),
    )


class Router:
    """The gate [E, H] with what its family makes of logits; each row's choice is its own."""

    def __init__(self, gate: Tensor, rule: ChoiceRule, *, fmt: str) -> None:
        parts, shape = {"weight": gate}, (gate.shape[0], gate.shape[1])
        self.num_experts, self.top_k = shape[0], rule.top_k
        self.logits = Product(parts, shape, fmt=fmt, bias=None)
        self.dtype = gate.dtype if rule.rounds_weights else torch.float32
        self.descriptor = RouterDescriptor(
            gate=native.matrix_of(parts, shape, fmt=fmt, bias=None),
            top_k=rule.top_k,
            epsilon=rule.epsilon,
            format=DTYPE_IDS[gate.dtype],
            rounds_scores=rule.rounds_scores,
            rounds_weights=rule.rounds_weights,
            is_renormalised=rule.is_renormalised,
        )

    def choose(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Contiguous [T, E] in the gate's dtype -> weights [T, K], descending, and ids [T, K]."""
        num_rows = router_logits.shape[0]
        ids = torch.empty(num_rows, self.top_k, dtype=torch.int64)
        weights = torch.empty(num_rows, self.top_k)
        scores = torch.empty(num_rows, self.num_experts)
        is_tied = torch.empty(num_rows, dtype=torch.int32)
        native.check_status(
            native.loaded().outrider_choose(
                ctypes.byref(self.descriptor),
                router_logits.data_ptr(),
                num_rows,
                ids.data_ptr(),
                weights.data_ptr(),
                scores.data_ptr(),
                is_tied.data_ptr(),
            )
        )
        self.settle(scores, is_tied, ids)
        return weights.to(self.dtype), ids

    def settle(self, scores: Tensor, is_tied: Tensor, ids: Tensor) -> None:
        """Of rows that are tied, choose anew: scores [T, E], is_tied [T], ids [T, K] in place.

        Row by row, so that a row's choice does not depend on its company.
        """
        for row in is_tied.nonzero().flatten().tolist():
            ids[row] = torch.topk(scores[row], self.top_k).indices


def gate_rows(gate: Tensor, rows: Tensor) -> None:
    """rows [T, N] *= sigmoid(gate [T, 1]), in place; both contiguous, of one dtype."""
    native.check_status(
        native.loaded().outrider_gate_rows(
            gate.data_ptr(), rows.data_ptr(), *rows.shape, DTYPE_IDS[rows.dtype]
        )
    )
