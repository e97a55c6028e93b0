"""The encoder of a token's context: frames of ids, past experts and past states, and attention.

A frame is what is known when a token is about to run: its id, and its predecessor's id, experts and
hidden states. Knows neither traces nor targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..collect.schema import ModelShape
from .context import UNKNOWN, Window

if TYPE_CHECKING:
    from .examples import Examples

PROFILE_ROWS = 8192
PRIOR_TOKENS = 2.0
"""A token's mean state counts this many more tokens at the mean of all, so that one seen once is
not taken for what it happened to be."""


@dataclass(slots=True)
class Frames:
    """B sequences of T frames, oldest first.

    `ids`, `past_ids` [B, T] int64 rows of the embedding, 0 for unknown ones; `cells` [B, T, L * k]
    int64 experts of the predecessor numbered over all layers, `weights` [B, T, L * k] what they
    count; `hidden` [B, T, layers * hidden_size]; `has_past`, `is_there` [B, T] bool.
    """

    ids: Tensor
    past_ids: Tensor
    cells: Tensor
    weights: Tensor
    hidden: Tensor
    has_past: Tensor
    is_there: Tensor

    def to(self, device: torch.device) -> Frames:
        """The same on `device`."""
        return Frames(*(getattr(self, name).to(device) for name in Frames.__slots__))


class Vocabulary:
    """Token ids seen in training, ascending; row 0 of an embedding stands for all others."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys) + 1

    def rows(self, token_ids: np.ndarray) -> np.ndarray:
        """Embedding rows of token ids of any shape."""
        if not len(self.keys):
            return np.zeros_like(token_ids)
        at = np.minimum(np.searchsorted(self.keys, token_ids), len(self.keys) - 1)
        return np.where(self.keys[at] == token_ids, at + 1, 0)


def frames_of(window: Window, vocabulary: Vocabulary, shape: ModelShape) -> Frames:
    """N windows as N sequences of C frames, the last one being the token about to run."""
    num_rows, context = window.past_ids.shape
    newest_first = np.concatenate([window.token_id[:, None], window.past_ids[:, :-1]], axis=1)
    layers = np.arange(shape.num_moe_layers)[:, None] * shape.num_experts
    cells = (window.topk_ids + layers).reshape(num_rows, context, -1)
    has_past = np.arange(context) < window.length[:, None]
    is_there = np.concatenate([np.ones((num_rows, 1), bool), has_past[:, :-1]], axis=1)
    weights = np.repeat(has_past[:, :, None], cells.shape[2], axis=2).astype(np.float32)
    past_ids = np.where(has_past, vocabulary.rows(window.past_ids), 0)
    arrays = (
        np.where(newest_first == UNKNOWN, 0, vocabulary.rows(newest_first)),
        past_ids,
        cells,
        weights,
        window.hidden.reshape(num_rows, context, -1),
        has_past,
        is_there,
    )
    return Frames(*(torch.from_numpy(array[:, ::-1].copy()) for array in arrays))


def token_profiles(examples: Examples, vocabulary: Vocabulary, *, width: int) -> Tensor:
    """[V, width] embeddings to begin with: each token's mean router inputs, whitened.

    Projected on the `width` directions in which the recorded states of all layers vary most, so
    that tokens which route alike start out alike. Row 0, the unknown token, is zero.
    """
    layers = list(examples.hidden.values())
    picked = np.arange(len(examples))[:: max(1, len(examples) // PROFILE_ROWS)]
    sample = torch.from_numpy(_joined(layers, picked))
    mean = sample.mean(dim=0)
    width_there = min(width, *sample.shape)
    _, strength, directions = torch.pca_lowrank(sample - mean, q=width_there, center=False)
    directions = directions * (len(picked) ** 0.5 / strength.clamp_min(1e-6))
    profiles = torch.zeros(len(vocabulary), width)
    counts = torch.zeros(len(vocabulary), 1)
    rows = torch.from_numpy(vocabulary.rows(examples.token_id.astype(np.int64)))
    for start in range(0, len(examples), PROFILE_ROWS):
        part = np.arange(start, min(start + PROFILE_ROWS, len(examples)))
        states = (torch.from_numpy(_joined(layers, part)) - mean) @ directions
        profiles[:, :width_there].index_add_(0, rows[part], states)
        counts.index_add_(0, rows[part], torch.ones(len(part), 1))
    profiles /= counts + PRIOR_TOKENS
    profiles[0] = 0.0
    return profiles


def _joined(layers: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    return np.concatenate([states[rows].astype(np.float32) for states in layers], axis=1)


class Block(nn.Module):
    """Pre-norm attention over the last frames, then a feed-forward part."""

    def __init__(self, width: int, heads: int, context: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.context = context
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.lag = nn.Parameter(torch.zeros(heads, context))
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor, lags: Tensor, last_only: bool) -> Tensor:
        """x [B, T, W]; mask [B, Q, T] of what may be seen, `lags` [Q, T]; Q is 1 if last_only."""
        batch, _, width = x.shape
        seen = self.norm(x)
        asking = seen[:, -1:] if last_only else seen
        shape = (batch, -1, self.heads, width // self.heads)
        query = self.query(asking).view(shape).transpose(1, 2)
        key, value = self.key_value(seen).chunk(2, dim=2)
        key, value = key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)
        bias = self.lag[:, lags].masked_fill(~mask[:, None], float("-inf"))
        scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5 + bias
        mixed = scores.softmax(dim=-1) @ value
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, -1, width))
        x = (x[:, -1:] if last_only else x) + F.dropout(mixed, self.dropout, self.training)
        fed = self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))
        return x + F.dropout(fed, self.dropout, self.training)


class Encoder(nn.Module):
    """Frames to one vector each, [B, T, width], every frame seeing the `context` newest ones."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        num_states: int,
        dropout: float,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        self.dropout = dropout
        self.checkpointing = checkpointing
        self.token = nn.Embedding(vocabulary, width)
        self.own = nn.Linear(width, width, bias=False)
        self.past = nn.Linear(width, width, bias=False)
        self.expert = nn.Embedding(shape.num_routed_experts, width)
        self.states = nn.Linear(num_states, width, bias=False) if num_states else None
        self.states_norm = nn.LayerNorm(num_states) if num_states else None
        self.none = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(
            Block(width, heads, context, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=1.0)
        nn.init.normal_(self.expert.weight, std=shape.top_k**-0.5 * shape.num_moe_layers**-0.5)

    def forward(self, frames: Frames, last_only: bool = False) -> Tensor:
        """[B, T, width]; [B, 1, width] of the last frames alone with `last_only`."""
        batch, length, _ = frames.cells.shape
        experts = F.embedding_bag(
            frames.cells.view(batch * length, -1),
            self.expert.weight,
            per_sample_weights=frames.weights.view(batch * length, -1).to(self.expert.weight.dtype),
            mode="sum",
        ).view(batch, length, -1)
        x = self.own(self.token(frames.ids)) + self.past(self.token(frames.past_ids)) + experts
        if self.states is not None and self.states_norm is not None:
            x = x + self.states(self.states_norm(frames.hidden.to(x.dtype)))
        x = torch.where(
            frames.has_past[:, :, None], x, self.own(self.token(frames.ids)) + self.none
        )
        x = F.dropout(x, self.dropout, self.training)
        lags = torch.arange(length)[:, None] - torch.arange(length)
        is_seen = (lags >= 0) & (lags < self.context)
        lags = lags.clamp(0, self.context - 1).to(x.device)
        mask = is_seen.to(x.device) & frames.is_there[:, None, :]
        # A frame always sees itself, so that padding yields numbers too.
        mask = mask | torch.eye(length, dtype=torch.bool, device=x.device)
        for index, block in enumerate(self.blocks):
            is_last = last_only and index == len(self.blocks) - 1
            seen = (mask[:, -1:], lags[-1:]) if is_last else (mask, lags)
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *seen, is_last, use_reentrant=False)
            else:
                x = block(x, *seen, is_last)
        if last_only and not self.blocks:
            x = x[:, -1:]
        return self.norm(x)
