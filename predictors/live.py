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
from .half_matrix import HalfMatrix

if TYPE_CHECKING:
    from .encoder import Block, Encoder, Vocabulary
    from .hierarchical import HierarchicalNetwork


class Linear:
    """A linear layer; rows [N, in] -> [N, out]."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight = HalfMatrix(layer.weight)
        self._bias = None if layer.bias is None else _array(layer.bias)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = self._weight(rows)
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

    def keys_values(self, x: np.ndarray) -> np.ndarray:
        """[T, 2 * W] of frames [T, W]."""
        return self._key_value(self._norm(x))

    def __call__(
        self, x: np.ndarray, keys_values: np.ndarray, is_seen: np.ndarray, lags: np.ndarray
    ) -> np.ndarray:
        """The asking frames `x` [Q, W] over the frames of `keys_values` [T, 2 * W].

        `is_seen`, `lags` [Q, T].
        """
        num_asking, num_frames = lags.shape
        width = x.shape[1]
        size = width // self._heads
        query = self._query(self._norm(x)).reshape(num_asking, self._heads, size)
        key, value = keys_values.reshape(num_frames, 2, self._heads, size).swapaxes(0, 1)
        scores = np.einsum("qhd,thd->hqt", query, key) * np.float32(size**-0.5)
        scores += self._lag[:, lags]
        scores[:, ~is_seen] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqt,thd->qhd", scores, value).reshape(num_asking, width)
        x = x + self._out(mixed)
        fed = torch.from_numpy(self._feed_in(self._feed_norm(x)))
        return x + self._feed_out(F.gelu(fed).numpy())


@dataclass(slots=True)
class Remembered:
    """A sequence's frames as the encoder's first block sees them, newest first.

    `rows` [T, 3 * W] hold a frame, its key and its value; `newest` is the frame of the token about
    to run, which joins them once that token has run.
    """

    rows: np.ndarray | None = None
    newest: np.ndarray | None = None

    def forget(self) -> None:
        """What is known of the sequence is out of date."""
        self.rows = self.newest = None

    def advance(self, num_tokens: int) -> None:
        """A pass over so many tokens has begun."""
        if num_tokens != 1 or self.newest is None:
            self.forget()
            return
        parts = [self.newest] if self.rows is None else [self.newest, self.rows]
        self.rows, self.newest = np.concatenate(parts), None


class LiveEncoder:
    """The encoding of one window's newest frame, `Encoder` with last_only."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, num_experts: int) -> None:
        self._vocabulary = vocabulary
        self._num_experts = num_experts
        self._context = encoder.context
        # Both products of an embedding are of the whole table, so they are looked up.
        token = encoder.token.weight.detach()
        self._own = _array(token @ encoder.own.weight.detach().T)
        self._past = _array(token @ encoder.past.weight.detach().T)
        self._expert = _array(encoder.expert.weight)
        self._states = None if encoder.states is None else Linear(encoder.states)
        self._states_norm = None if encoder.states_norm is None else Norm(encoder.states_norm)
        self._none = _array(encoder.none)
        self._blocks = [LiveBlock(block) for block in encoder.blocks]  # type: ignore[arg-type]
        self._norm = Norm(encoder.norm)

    def __call__(self, window: Window, known: Remembered) -> np.ndarray:
        """[1, W] of a window of one row; `known` is read and brought up to date."""
        length = int(window.length[0])
        num_frames = min(length + 1, window.past_ids.shape[1])
        num_known = 0 if known.rows is None else min(len(known.rows), num_frames - 1)
        if num_known < num_frames - 1:
            # After a prompt, whose frames nobody asked for.
            num_known = 0
        fresh = self._frames(window, num_frames - num_known, length)
        first = self._blocks[0] if self._blocks else None
        if first is not None:
            fresh = np.concatenate([fresh, first.keys_values(fresh)], axis=1)
        rows = fresh
        if num_known and known.rows is not None:
            rows = np.concatenate([fresh, known.rows[:num_known]])
        known.newest, known.rows = rows[:1], rows[1:]
        rows = rows[::-1]
        width = len(self._none)
        x, keys_values = rows[:, :width], rows[:, width:]
        lags = np.arange(num_frames)[:, None] - np.arange(num_frames)
        is_seen = (lags >= 0) & (lags < self._context)
        lags = np.clip(lags, 0, self._context - 1)
        for index, block in enumerate(self._blocks):
            if index:
                keys_values = block.keys_values(x)
            asking = slice(-1, None) if index == len(self._blocks) - 1 else slice(None)
            x = block(x[asking], keys_values, is_seen[asking], lags[asking])
        return self._norm(x[-1:])

    def _frames(self, window: Window, count: int, length: int) -> np.ndarray:
        """[count, W] of the newest frames, newest first; frame i follows past token i."""
        ids = np.concatenate([window.token_id, window.past_ids[0, : count - 1]])
        x = self._own[np.where(ids == UNKNOWN, 0, self._vocabulary.rows(ids))]
        there = min(length, count)
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
        return x


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
