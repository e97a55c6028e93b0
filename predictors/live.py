"""The hierarchical network for one running sequence, in numpy: PyTorch's cost a call is most of a
small network's time.

Computes what `HierarchicalNetwork` computes for the last frame, to rounding; an encoding is shared
by all horizons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .context import UNKNOWN, Window

if TYPE_CHECKING:
    from .encoder import Block, Encoder, Vocabulary
    from .hierarchical import HierarchicalNetwork


class Linear:
    """A linear layer; rows [N, in] -> [N, out]."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight = _array(layer.weight)
        self._bias = None if layer.bias is None else _array(layer.bias)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = rows @ self._weight.T
        if self._bias is not None:
            found += self._bias
        return found


class Norm:
    """Layer normalisation of rows."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        self._weight, self._bias, self._eps = _array(layer.weight), _array(layer.bias), layer.eps

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        size = np.float32(rows.shape[1])
        centred = rows - rows.sum(axis=1, keepdims=True) / size
        variance = np.einsum("nw,nw->n", centred, centred)[:, None] / size
        centred /= np.sqrt(variance + np.float32(self._eps))
        centred *= self._weight
        centred += self._bias
        return centred


class LiveBlock:
    """One block of the encoder: [T, W] -> [T, W], or [1, W] of the last frame."""

    def __init__(self, block: Block) -> None:
        self._heads = block.heads
        self._norm, self._feed_norm = Norm(block.norm), Norm(block.feed_norm)
        self._query, self._key_value = Linear(block.query), Linear(block.key_value)
        self._out, self._lag = Linear(block.out), _array(block.lag)
        self._feed_in, self._feed_out = Linear(block.feed_in), Linear(block.feed_out)

    def __call__(self, x: np.ndarray, is_seen: np.ndarray, lags: np.ndarray) -> np.ndarray:
        """`is_seen`, `lags` [Q, T]; Q is T, or 1 for the last frame alone."""
        num_asking, num_frames = lags.shape
        width = x.shape[1]
        size = width // self._heads
        seen = self._norm(x)
        query = self._query(seen[-num_asking:]).reshape(num_asking, self._heads, size)
        key, value = self._key_value(seen).reshape(num_frames, 2, self._heads, size).swapaxes(0, 1)
        scores = np.einsum("qhd,thd->hqt", query, key) * np.float32(size**-0.5)
        scores += self._lag[:, lags]
        scores[:, ~is_seen] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqt,thd->qhd", scores, value).reshape(num_asking, width)
        x = x[-num_asking:] + self._out(mixed)
        fed = torch.from_numpy(self._feed_in(self._feed_norm(x)))
        return x + self._feed_out(F.gelu(fed).numpy())


class LiveEncoder:
    """The encoding of one window's newest frame, `Encoder` with last_only."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, num_experts: int) -> None:
        self._vocabulary = vocabulary
        self._num_experts = num_experts
        self._context = encoder.context
        # Both products of an embedding are of the whole table, so they are looked up.
        token = _array(encoder.token.weight)
        self._own = token @ _array(encoder.own.weight).T
        self._past = token @ _array(encoder.past.weight).T
        self._expert = _array(encoder.expert.weight)
        self._states = None if encoder.states is None else Linear(encoder.states)
        self._states_norm = None if encoder.states_norm is None else Norm(encoder.states_norm)
        self._none = _array(encoder.none)
        self._blocks = [LiveBlock(block) for block in encoder.blocks]  # type: ignore[arg-type]
        self._norm = Norm(encoder.norm)

    def __call__(self, window: Window) -> np.ndarray:
        """[1, W] of a window of one row."""
        length = int(window.length[0])
        frames = min(length + 1, window.past_ids.shape[1])
        # Newest first, as the window has them; frame i's predecessor is past token i.
        ids = np.concatenate([window.token_id, window.past_ids[0, : frames - 1]])
        x = self._own[np.where(ids == UNKNOWN, 0, self._vocabulary.rows(ids))]
        there = min(length, frames)
        if there:
            cells = window.topk_ids[0, :there]
            layers = np.arange(cells.shape[1])[:, None] * self._num_experts
            x[:there] += self._expert[(cells + layers).reshape(there, -1)].sum(axis=1)
            past = window.past_ids[0, :there]
            x[:there] += self._past[np.where(past == UNKNOWN, 0, self._vocabulary.rows(past))]
            if self._states is not None and self._states_norm is not None:
                hidden = window.hidden[0, :there].reshape(there, -1)
                x[:there] += self._states(self._states_norm(hidden))
        x[there:] += self._none
        x = x[::-1]
        lags = np.arange(frames)[:, None] - np.arange(frames)
        is_seen = (lags >= 0) & (lags < self._context)
        lags = np.clip(lags, 0, self._context - 1)
        for index, block in enumerate(self._blocks):
            asking = slice(-1, None) if index == len(self._blocks) - 1 else slice(None)
            x = block(x, is_seen[asking], lags[asking])
        return self._norm(x[-1:])


@dataclass(slots=True)
class LiveHierarchical:
    """`HierarchicalNetwork` for one window at a time."""

    encoder: LiveEncoder
    heads: list[Linear]
    member: np.ndarray
    cluster: np.ndarray

    @classmethod
    def of(cls, network: HierarchicalNetwork, vocabulary: Vocabulary) -> LiveHierarchical:
        """A copy of the network's weights as they are now."""
        cluster = network.cluster.numpy()  # type: ignore[operator]
        member = cluster[:, :, None] == np.arange(network.num_clusters)
        return cls(
            LiveEncoder(network.encoder, vocabulary, network.shape.num_experts),
            [Linear(head) for head in network.heads],  # type: ignore[arg-type]
            member.astype(np.float32),
            cluster,
        )

    def scores(self, encoded: np.ndarray, base: np.ndarray, horizon: int) -> np.ndarray:
        """[L, E] of the encoding [1, W] and base log-odds [L, E] of that horizon."""
        layers, experts = base.shape
        found = self.heads[horizon - 1](encoded).reshape(layers, -1)
        clusters = self._log_sums(base) + found[:, experts:]
        within = base + found[:, :experts]
        # The clusters' own normalisation shifts a whole layer, which ranks and calibration ignore;
        # it is kept, so that scores are the network's.
        level = clusters.max(axis=1, keepdims=True)
        level += np.log(np.exp(clusters - level).sum(axis=1, keepdims=True))
        shift = clusters - level - self._log_sums(within)
        within += np.take_along_axis(shift, self.cluster, axis=1)
        return within

    def _log_sums(self, values: np.ndarray) -> np.ndarray:
        """[L, C] log-sum-exp of [L, E] within each cluster."""
        largest = values.max(axis=1, keepdims=True)
        sums = np.einsum("le,lec->lc", np.exp(values - largest), self.member)
        sums += np.float32(1e-9)
        return np.log(sums) + largest


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
