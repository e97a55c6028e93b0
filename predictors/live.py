"""The hierarchical network for one running sequence: PyTorch's cost a call is most of a small
network's time, so a token is one native call (`kernels.forecast`).

The same in numpy stands beside it, for the first token after a prompt and where the library is
missing. Both compute what `HierarchicalNetwork` computes for the last frame, to rounding; an
encoding is shared by all horizons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import forecast as native
from .context import UNKNOWN, Window
from .half_matrix import HalfMatrix

if TYPE_CHECKING:
    from .encoder import Block, Encoder, Vocabulary
    from .hierarchical import Hierarchical, HierarchicalNetwork


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

    def described(self) -> native.HalfLinear:
        """For the native calls."""
        return native.HalfLinear(self._weight.weight, self._bias)


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

    def described(self) -> native.LayerNorm:
        """For the native calls."""
        return native.LayerNorm(self._weight, self._bias, self._eps)


class LiveBlock:
    """One block of the encoder: [T, W] -> [T, W], or [1, W] of the last frame."""

    def __init__(self, block: Block) -> None:
        self._heads = block.heads
        self._norm, self._feed_norm = Norm(block.norm), Norm(block.feed_norm)
        self._query, self._key_value = Linear(block.query), Linear(block.key_value)
        self._out, self._lag = Linear(block.out), _array(block.lag)
        self._feed_in, self._feed_out = Linear(block.feed_in), Linear(block.feed_out)

    def described(self) -> native.EncoderBlock:
        """For the native calls."""
        return native.EncoderBlock(
            norm=self._norm.described(),
            feed_norm=self._feed_norm.described(),
            query=self._query.described(),
            key_value=self._key_value.described(),
            out=self._out.described(),
            feed_in=self._feed_in.described(),
            feed_out=self._feed_out.described(),
            lag=self._lag,
        )

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


class Remembered:
    """A sequence's frames as the encoder's first block sees them.

    `frames` [context, 3 * W], newest first, hold a frame, its key and its value. The first is that
    of the token about to run, once `is_asked`; `num_known` others follow it.
    """

    def __init__(self, context: int, width: int) -> None:
        self.frames = np.zeros((context, 3 * width), np.float32)
        self.num_known = 0
        self.is_asked = False

    def forget(self) -> None:
        """What is known of the sequence is out of date."""
        self.num_known, self.is_asked = 0, False

    def advance(self, num_tokens: int) -> None:
        """A pass over so many tokens has begun."""
        if num_tokens != 1 or not self.is_asked:
            self.forget()
            return
        self.frames[1:] = self.frames[:-1]
        self.num_known = min(self.num_known + 1, len(self.frames) - 1)
        self.is_asked = False

    def serves(self, num_frames: int) -> bool:
        """All of the newest `num_frames` are here but that of the token about to run."""
        return self.num_known >= num_frames - 1


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
        # Not there after a prompt, whose frames nobody asked for.
        num_fresh = 1 if known.serves(num_frames) else num_frames
        fresh = self._frames(window, num_fresh, length)
        first = self._blocks[0] if self._blocks else None
        if first is not None:
            fresh = np.concatenate([fresh, first.keys_values(fresh)], axis=1)
        known.frames[:num_fresh, : fresh.shape[1]] = fresh
        known.num_known, known.is_asked = num_frames - 1, True
        rows = known.frames[:num_frames]
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

    def described(self) -> dict[str, Any]:
        """For the native calls."""
        states = None
        if self._states is not None and self._states_norm is not None:
            states = self._states.described(), self._states_norm.described()
        return {
            "vocabulary": self._vocabulary.keys,
            "own": self._own,
            "past": self._past,
            "expert": self._expert,
            "none": self._none,
            "states": states,
            "blocks": [block.described() for block in self._blocks],
            "norm": self._norm.described(),
        }

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
    native: native.TokenForecast | None

    @classmethod
    def of(cls, family: Hierarchical) -> LiveHierarchical:
        """A copy of the network's weights as they are now."""
        network: HierarchicalNetwork = family.network  # type: ignore[assignment]
        cluster = network.cluster.numpy()  # type: ignore[operator]
        member = cluster[:, :, None] == np.arange(network.num_clusters)
        encoder = LiveEncoder(network.encoder, family.vocabulary, network.shape.num_experts)
        heads = [Linear(head) for head in network.heads]  # type: ignore[arg-type]
        called = None
        if native.is_available() and family.frequencies is not None:
            called = native.TokenForecast(
                **encoder.described(),
                horizons=_horizons(family, heads),
                cluster=cluster,
                num_clusters=network.num_clusters,
                frequencies=family.frequencies,
                top_k=family.shape.top_k,
            )
        return cls(encoder, heads, member.astype(np.float32), cluster, called)

    def forecast(self, window: Window, known: Remembered) -> tuple[np.ndarray, np.ndarray] | None:
        """Calibrated [horizon, L, E] of a window of one row and the first's log-odds, by one call.

        None where that cannot be: without the library, or where earlier frames are not known.
        """
        length = int(window.length[0])
        num_frames = min(length + 1, len(known.frames))
        if self.native is None or not known.serves(num_frames):
            return None
        known.num_known, known.is_asked = num_frames - 1, True
        return self.native(
            int(window.token_id[0]),
            past_id=int(window.past_ids[0, 0]),
            topk_ids=window.topk_ids[0, 0],
            states=window.hidden[0, 0],
            has_past=length > 0,
            frames=known.frames,
            num_frames=num_frames,
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


def _horizons(family: Hierarchical, heads: list[Linear]) -> list[native.HorizonHead]:
    statistics = family.statistics
    return [
        native.HorizonHead(
            keys=table.keys,
            totals=table.totals,
            steps=table.steps,
            cells=table.cells,
            strength=strength,
            transitions=transitions.probability,
            head=head.described(),
            scale=scale,
        )
        for table, strength, transitions, head, scale in zip(
            statistics.tables,
            statistics.strengths,
            statistics.transitions,
            heads,
            family.calibration.scale,
            strict=True,
        )
    ]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
