"""One layer's part of the ensemble, ready to run: gates merged, weights in fp16, buffers laid out.

A single token is one native call where the library is there (`kernels.forecast`); else, and for
several tokens, it is the same mathematics in PyTorch and numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..collect.schema import ModelShape
from ..kernels import forecast as native
from .corrected import ranking_scores
from .drift import NUM_LINEAR, LiveStage, Stage, num_features, own_choice, past_layers
from .half_matrix import HalfMatrix
from .in_pass import later_layers, quick_inclusion, to_host, union

if TYPE_CHECKING:
    from torch import Tensor

    from .lookahead import Gate


class Rows:
    """States [L, H] float32, zero at first; `views` are tensors [1, H] of each row."""

    def __init__(self, shape: ModelShape) -> None:
        self.array = np.zeros((shape.num_moe_layers, shape.hidden_size), np.float32)
        self.views = [torch.from_numpy(row[None]) for row in self.array]
        self._start, self._stride = self.array.ctypes.data, self.array.strides[0]

    def address(self, layer_idx: int) -> int:
        """Where the layer's state stands."""
        return self._start + layer_idx * self._stride


class States:
    """A sequence's states by layer: of this pass, and of the token before."""

    def __init__(self, shape: ModelShape) -> None:
        self.past, self.now = Rows(shape), Rows(shape)
        # Of this pass's states the one that was written before it was to be stored.
        self.written: int | None = None

    def begin(self) -> None:
        """A new sequence."""
        self.past.array[:] = 0.0
        self.now.array[:] = 0.0
        self.written = None

    def store(self, layer_idx: int, router_input: Tensor) -> Tensor:
        """The last token's state [1, H] float32, which is kept; a live view."""
        if self.written != layer_idx:
            self.now.array[layer_idx] = to_host(router_input, last_only=True)[0]
        self.written = None
        return self.now.views[layer_idx]

    def end_pass(self) -> None:
        """This pass's states are the token before's from now on."""
        self.past, self.now = self.now, self.past


class LiveForecast:
    """A stage of the ensemble for running sequences; `both`, `alone` [D, 2] are the slopes."""

    def __init__(
        self,
        stage: Stage,
        layer_idx: int,
        gates: Sequence[Gate],
        *,
        shape: ModelShape,
        both: np.ndarray,
        alone: np.ndarray,
        is_sigmoid: bool,
    ) -> None:
        self._shape = shape
        self._layer_idx = layer_idx
        self._stage = LiveStage(stage)
        self._targets = later_layers(shape, layer_idx)
        self._past_layers = past_layers(shape, layer_idx)
        weight, self._bias = stacked_gates(gates, self._targets)
        self._gate = HalfMatrix(weight)
        self._own = HalfMatrix(gates[layer_idx][0].cpu())
        self._is_sigmoid = is_sigmoid
        self._of_drift, self._of_odds = both[:, :1].copy(), both[:, 1:].copy()
        self._of_drift_alone = alone[:, :1].copy()
        self._features = np.zeros((1, num_features(shape)), np.float32)
        self._odds_offset = np.float32().nbytes * self._targets.start * shape.num_experts
        self._native = None
        if native.is_available():
            self._native = native.LayerForecast(
                inner=native.HalfLinear(self._stage.inner.weight, stage.inner_offset),
                up=native.HalfLinear(self._stage.up.weight, stage.offset),
                gate=native.HalfLinear(self._gate.weight),
                own=native.HalfLinear(self._own.weight),
                bias=self._bias,
                of_drift=self._of_drift[:, 0],
                of_odds=self._of_odds[:, 0],
                alone=self._of_drift_alone[:, 0],
                top_k=shape.top_k,
                num_linear=NUM_LINEAR,
                is_sigmoid=is_sigmoid,
            )

    def __call__(self, router_input: Tensor, states: States, odds: np.ndarray | None) -> np.ndarray:
        """[D, E] probabilities of the later layers; the union where there are several tokens."""
        states.written = None
        if len(router_input) > 1:
            # Of several tokens at once, the later layers' states at the token before are not there.
            return self.plain(to_host(router_input, last_only=False), None, None, odds)
        layer_idx, now, past = self._layer_idx, states.now, states.past
        if self._native is None:
            before = now.array[layer_idx - 1 : layer_idx] if layer_idx else None
            rows = to_host(router_input, last_only=False)
            return self.plain(rows, before, past.array, odds)
        first, second = self._past_layers
        table = self._native(
            router_input if router_input.is_cpu else router_input.cpu(),
            kept=now.address(layer_idx),
            before=now.address(layer_idx - 1) if layer_idx else None,
            past=(past.address(first), past.address(second)),
            odds=None if odds is None else odds.ctypes.data + self._odds_offset,
        )
        states.written = layer_idx
        return table

    def plain(
        self,
        states: np.ndarray,
        before: np.ndarray | None,
        past: np.ndarray | None,
        odds: np.ndarray | None,
    ) -> np.ndarray:
        """The same without the library, of states [T, H]."""
        size, experts = self._shape.hidden_size, self._shape.num_experts
        tokens = len(states)
        features = self._features
        if tokens > 1:
            features = np.zeros((tokens, features.shape[1]), np.float32)
        features[:, :size] = states
        features[:, size : size + experts] = own_choice(self._own(states), self._shape.top_k)
        start = size + experts
        features[:, start : start + size] = 0.0 if before is None else before
        for place, layer in enumerate(self._past_layers, start=1):
            at = start + place * size
            features[:, at : at + size] = 0.0 if past is None else past[layer]
        logits = self._stage.corrections(features)
        logits += self._gate(states)
        scores = ranking_scores(
            logits.reshape(tokens, -1, experts), self._bias, is_sigmoid=self._is_sigmoid
        )
        if odds is None:
            scores = scores * self._of_drift_alone
        else:
            scores = scores * self._of_drift
            scores += odds[self._targets.start : self._targets.stop] * self._of_odds
        return union(quick_inclusion(scores, self._shape.top_k))


def stacked_gates(
    gates: Sequence[Gate], targets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The later layers' gates [D * E, H], and their biases [D, E] where all have one."""
    weights = [gates[target][0].float().cpu().numpy() for target in targets]
    biases = [gates[target][1] for target in targets]
    if any(bias is None for bias in biases):
        return np.concatenate(weights), None
    stacked = np.stack([bias.float().cpu().numpy() for bias in biases if bias is not None])
    return np.concatenate(weights), stacked
