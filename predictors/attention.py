"""The attention predictor: heads that look at every layer's experts, what they did lately and which
others follow them; a routing head, and a confidence head that says how much to trust it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collect.schema import ModelShape
from .checkpoint import take
from .context import MAX_ROWS, Window
from .encoder import Encoder, Frames
from .errors import PredictorError
from .network import Network, NetworkFamily
from .presets import Settings
from .statistics import Transitions

if TYPE_CHECKING:
    from .examples import Examples

HEAD_SIZE = 16
_PLATT_STEPS = 25


class AttentionNetwork(Network):
    """Queries from the new frame, keys from expert states; corrections of the base log-odds.

    An expert's state is a learned key, how much the context used it, and how much the experts used
    there are followed by it in the relationship graph `graph` [L, E, E] (its excess over the
    expert's frequency). Attention over a layer's experts gives that layer's view of the context,
    from which the routing head scores experts and the confidence head says which share of its
    top_k will be right.
    """

    def __init__(
        self,
        shape: ModelShape,
        settings: Settings,
        *,
        vocabulary: int,
        num_states: int,
        graph: np.ndarray,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.horizon = settings.horizon
        self.num_heads = settings.heads
        self.context = settings.context
        width, layers, experts = settings.width, shape.num_moe_layers, shape.num_experts
        inner = self.num_heads * HEAD_SIZE
        self.encoder = Encoder(
            shape,
            vocabulary=vocabulary,
            width=width,
            layers=0,
            heads=settings.heads,
            context=settings.context,
            num_states=num_states,
            dropout=settings.dropout,
        )
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.dropout = settings.dropout
        self.lag = nn.Parameter(torch.linspace(1.0, 0.0, settings.context))
        self.query = nn.Linear(width, layers * inner)
        self.key = nn.Parameter(torch.randn(layers, experts, self.num_heads, HEAD_SIZE))
        # What usage and graph add to a key, as the query sees it.
        self.sense = nn.Linear(width, layers * self.num_heads * 2)
        self.value = nn.Parameter(0.1 * torch.randn(layers, experts, inner))
        self.mix = nn.Linear(inner, width)
        self.mix_norm = nn.LayerNorm(width)
        self.routing = nn.Parameter(torch.zeros(settings.horizon, layers, experts, width))
        self.direct = nn.Parameter(torch.zeros(settings.horizon, layers, self.num_heads))
        self.confidence = nn.Parameter(torch.zeros(settings.horizon, layers, width + 1))
        self.sharpness = nn.Parameter(torch.zeros(settings.horizon, layers))
        self.register_buffer("graph", torch.from_numpy(graph.astype(np.float32)))
        self.confidence_logits: dict[int, Tensor] = {}

    def forward(
        self, frames: Frames, bases: Mapping[int, Tensor], last_only: bool = False
    ) -> dict[int, Tensor]:
        shape = self.shape
        x = self.encoder(frames, last_only)
        x = x + F.dropout(self.feed_out(F.gelu(self.feed_in(x))), self.dropout, self.training)
        size = (*x.shape[:2], shape.num_moe_layers, self.num_heads)
        query = self.query(x).view(*size, HEAD_SIZE)
        sense = self.sense(x).view(*size, 2)
        usage = self._usage(frames, last_only)
        follows = torch.einsum("btle,lef->btlf", usage, self.graph)  # type: ignore[arg-type]
        scores = torch.einsum("btlhd,lehd->btlhe", query, self.key) * HEAD_SIZE**-0.5
        for index, state in enumerate((usage, follows)):
            scores = scores + sense[..., index, None] * state[:, :, :, None, :].to(scores.dtype)
        values = self.value.view(*self.key.shape)
        seen = torch.einsum("btlhe,lehd->btlhd", scores.softmax(dim=-1), values)
        view = x[:, :, None] + self.mix(seen.flatten(3))
        view = F.dropout(self.mix_norm(view), self.dropout, self.training)
        self.confidence_logits = {}
        results = {}
        for horizon, base in bases.items():
            index = horizon - 1
            corrections = torch.einsum("btlw,lew->btle", view, self.routing[index])
            corrections = corrections + torch.einsum("btlhe,lh->btle", scores, self.direct[index])
            weight = self.confidence[index]
            confidence = (view * weight[:, :-1]).sum(dim=-1) + weight[:, -1]
            self.confidence_logits[horizon] = confidence.float()
            sharp = (self.sharpness[index] * confidence.tanh()).float().exp()
            results[horizon] = (base + corrections.float()) * sharp[..., None]
        return results

    def auxiliary(
        self,
        scores: Mapping[int, Tensor],
        used: Mapping[int, Tensor],
        valid: Mapping[int, Tensor],
    ) -> Tensor:
        """Log loss of the confidence against the share of its top_k that was right."""
        losses = []
        for horizon, logits in self.confidence_logits.items():
            best = scores[horizon].detach().topk(self.shape.top_k, dim=-1).indices
            recall = used[horizon].gather(-1, best).float().mean(dim=-1)
            loss = F.binary_cross_entropy_with_logits(logits, recall, reduction="none").mean(dim=-1)
            is_valid = valid[horizon]
            losses.append((loss * is_valid).sum() / is_valid.sum().clamp_min(1))
        return torch.stack(losses).sum()

    def _usage(self, frames: Frames, last_only: bool) -> Tensor:
        """[B, T, L, E]: how much the context of each frame used each expert."""
        batch, length, _ = frames.cells.shape
        used = self.lag.new_zeros(batch, length, self.shape.num_routed_experts)
        used.scatter_(-1, frames.cells, frames.weights.to(used.dtype))
        lags = torch.arange(length)[:, None] - torch.arange(length)
        is_seen = ((lags >= 0) & (lags < self.context)).to(used.device)
        lags = lags.clamp(0, self.context - 1).to(used.device)
        weights = torch.where(is_seen, self.lag[lags], 0.0)
        if last_only:
            weights = weights[-1:]
        return (weights @ used).view(batch, -1, self.shape.num_moe_layers, self.shape.num_experts)


class Attention(NetworkFamily):
    """Multi-head attention over expert states, residual on token statistics.

    `trust` [2, horizon, L]: slope and offset that make the confidence head's value the share of
    the top_k that turns out right.
    """

    name = "attention"
    trust: np.ndarray

    @classmethod
    def prepare(cls, examples: Examples, settings: Settings) -> dict[str, np.ndarray]:
        """The relationship graph: how much likelier each expert is after another than ever."""
        graph = Transitions.count(examples, lag=1).probability - examples.frequencies()[:, None, :]
        return {"graph": graph}

    @classmethod
    def build(
        cls,
        shape: ModelShape,
        settings: Settings,
        *,
        vocabulary: int,
        num_states: int,
        constants: Mapping[str, np.ndarray],
    ) -> Network:
        square = (shape.num_moe_layers, shape.num_experts, shape.num_experts)
        graph = take(constants, "graph", square)
        return AttentionNetwork(
            shape, settings, vocabulary=vocabulary, num_states=num_states, graph=graph
        )

    def confidence(self, window: Window, horizon: int = 1) -> np.ndarray:
        """[N, L] calibrated: which share of each layer's top_k is expected to be right."""
        logits = self._confidence_logits(window, horizon)
        slope, offset = self.trust[:, horizon - 1]
        return 1.0 / (1.0 + np.exp(-(slope * logits + offset)))

    def calibrate(self, validation: Examples, *, max_rows: int = MAX_ROWS) -> None:
        from .context import window_of

        super().calibrate(validation, max_rows=max_rows)
        self.trust = np.zeros((2, self.horizon, self.shape.num_moe_layers))
        for horizon in range(1, self.horizon + 1):
            rows = validation.rows(horizon)
            rows = rows[:: max(1, len(rows) // max_rows)]
            window = window_of(
                validation, rows, context=self.context, hidden_layers=self.hidden_layers
            )
            scores = self.log_odds(window, horizon)
            best = np.argsort(-scores, axis=2)[:, :, : self.shape.top_k]
            used = validation.membership(rows + horizon - 1)
            recall = np.take_along_axis(used, best, axis=2).mean(axis=2)
            self.trust[:, horizon - 1] = platt(self._confidence_logits(window, horizon), recall)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, config = super().state()
        return tensors, {**config, "confidence": self.trust.tolist()}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        made = super().from_state(tensors, config, shape)
        made.trust = np.array(config["confidence"], np.float64)
        expected = (2, made.horizon, shape.num_moe_layers)
        if made.trust.shape != expected:
            raise PredictorError(f"confidence is {made.trust.shape}, expected {expected}")
        return made

    @torch.inference_mode()
    def _confidence_logits(self, window: Window, horizon: int) -> np.ndarray:
        network = self.network
        assert isinstance(network, AttentionNetwork)
        self.log_odds(window, horizon)
        return network.confidence_logits[horizon][:, 0].numpy()


def platt(logits: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[2, L] slope and offset of the logistic fit of `share` [N, L] to `logits` [N, L].

    Newton's method on the log loss (Platt 1999), with a little ridge towards slope 1, offset 0.
    """
    logits = logits.astype(np.float64)
    slope, offset = np.ones(logits.shape[1]), np.zeros(logits.shape[1])
    for _ in range(_PLATT_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(slope * logits + offset, -30.0, 30.0)))
        error, weight = share - chance, chance * (1.0 - chance)
        first = (error * logits).mean(axis=0) - 1e-3 * (slope - 1.0)
        second = error.mean(axis=0) - 1e-3 * offset
        a = (weight * logits * logits).mean(axis=0) + 1e-3
        b = (weight * logits).mean(axis=0)
        c = weight.mean(axis=0) + 1e-3
        determinant = a * c - b * b
        slope = slope + np.clip((c * first - b * second) / determinant, -1.0, 1.0)
        offset = offset + np.clip((a * second - b * first) / determinant, -1.0, 1.0)
    return np.stack([slope, offset])
