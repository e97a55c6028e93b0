"""The hierarchical predictor: which cluster of experts, then which expert within it.

Both heads sit on an encoder of the context and correct what token statistics say; the product of
their two softmaxes ranks the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..collect.schema import ModelShape
from .base import Forecast
from .cluster import assign, k_means
from .context import UNKNOWN, ContextPredictor, Window
from .encoder import Encoder, Frames
from .live import LiveHierarchical, Remembered
from .network import Network, NetworkFamily
from .presets import Settings

if TYPE_CHECKING:
    from .examples import Examples

MAX_ROWS = 65_536


class HierarchicalNetwork(Network):
    """Scores are log P(cluster) + log P(expert | cluster), up to a constant of the layer.

    `cluster` [L, E] int64 names each expert's cluster. Without the heads' corrections both
    softmaxes follow from the base log-odds alone.
    """

    def __init__(
        self,
        shape: ModelShape,
        settings: Settings,
        *,
        vocabulary: int,
        num_states: int,
        cluster: np.ndarray,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.horizon = settings.horizon
        self.encoder = Encoder(
            shape,
            vocabulary=vocabulary,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            context=settings.context,
            num_states=num_states,
            dropout=settings.dropout,
            checkpointing=settings.checkpointing,
        )
        self.num_clusters = int(cluster.max()) + 1
        cells = shape.num_moe_layers * (shape.num_experts + self.num_clusters)
        self.heads = nn.ModuleList(
            nn.Linear(settings.width, cells) for _ in range(settings.horizon)
        )
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        self.register_buffer("cluster", torch.from_numpy(cluster.astype(np.int64)))
        self._cluster_logs: dict[int, Tensor] = {}

    def forward(
        self, frames: Frames, bases: Mapping[int, Tensor], last_only: bool = False
    ) -> dict[int, Tensor]:
        encoded = self.encoder(frames, last_only)
        self._cluster_logs = {}
        results = {}
        for horizon, base in bases.items():
            clusters, results[horizon] = self._scores(self.heads[horizon - 1](encoded), base)
            if self.training:
                self._cluster_logs[horizon] = clusters
        return results

    def auxiliary(
        self,
        scores: Mapping[int, Tensor],
        used: Mapping[int, Tensor],
        valid: Mapping[int, Tensor],
    ) -> Tensor:
        """Cross-entropy of the cluster head to each cluster's share of the experts used."""
        losses = []
        for horizon, logs in self._cluster_logs.items():
            share = self._by_cluster(used[horizon].to(logs.dtype)) / self.shape.top_k
            loss = -(share * logs).sum(dim=-1).mean(dim=-1)
            is_valid = valid[horizon]
            losses.append((loss * is_valid).sum() / is_valid.sum().clamp_min(1))
        return torch.stack(losses).sum()

    def _scores(self, corrections: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the clusters [B, T, L, C] and scores of the experts."""
        shape = (*base.shape[:-1], self.shape.num_experts + self.num_clusters)
        corrections = corrections.float().view(shape)
        of_expert = corrections[..., : self.shape.num_experts]
        of_cluster = corrections[..., self.shape.num_experts :]
        clusters = (self._log_sums(base) + of_cluster).log_softmax(dim=-1)
        within = base + of_expert
        shift = clusters - self._log_sums(within)
        index = self.cluster.expand(*base.shape)  # type: ignore[operator]
        return clusters, within + shift.gather(-1, index)

    def _log_sums(self, values: Tensor) -> Tensor:
        """[..., L, C] log-sum-exp of [..., L, E] within each cluster."""
        largest = values.amax(dim=-1, keepdim=True).detach()
        return (self._by_cluster((values - largest).exp()) + 1e-9).log() + largest

    def _by_cluster(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(*values.shape[:-1], self.num_clusters)
        return sums.scatter_add(-1, self.cluster.expand(*values.shape), values)  # type: ignore[operator]


class Hierarchical(NetworkFamily):
    """Cluster head x expert head over a transformer encoder, residual on token statistics."""

    name = "hierarchical"
    _live: LiveHierarchical | None = None

    def make(
        self, gates: Any = None, *, scoring: str = "softmax", tokens: str = "all"
    ) -> ContextPredictor:
        """A predictor for one sequence; it needs no gates."""
        if self._live is None:
            self._live = LiveHierarchical.of(self)
        return HierarchicalPredictor(self, self._live)

    @classmethod
    def prepare(cls, examples: Examples, settings: Settings) -> dict[str, np.ndarray]:
        """Clusters of each layer's experts: k-means over which other experts they are used with."""
        shape = examples.shape
        rows = np.arange(len(examples))[:: max(1, len(examples) // MAX_ROWS)]
        clusters = []
        for layer_idx in range(shape.num_moe_layers):
            used = np.zeros((len(rows), shape.num_experts), np.float32)
            np.put_along_axis(used, examples.topk_ids[rows, layer_idx].astype(np.int64), 1.0, 1)
            together = used.T @ used
            np.fill_diagonal(together, 0.0)
            norm = np.sqrt(np.maximum(together.sum(axis=1), 1.0))
            together /= norm[:, None] * norm[None]
            centres = k_means(together, settings.clusters, seed=settings.seed)
            clusters.append(assign(together, centres)[0])
        return {"cluster": np.stack(clusters)}

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
        return HierarchicalNetwork(
            shape,
            settings,
            vocabulary=vocabulary,
            num_states=num_states,
            cluster=_checked(constants, shape),
        )


class HierarchicalPredictor(ContextPredictor):
    """A Hierarchical following one sequence; a token is encoded once for all horizons."""

    def __init__(self, family: Hierarchical, live: LiveHierarchical) -> None:
        super().__init__(family)
        self._statistics = family.statistics
        self._live = live
        # Of the token that was asked about last, while nothing was observed since.
        self._encoded: np.ndarray | None = None
        self._found: tuple[np.ndarray, np.ndarray] | None = None
        self._asked_id = UNKNOWN
        self._known = Remembered(family.context, family.settings.width)
        self._last_layer = family.shape.num_moe_layers

    def begin(self, prompt_ids: np.ndarray) -> None:
        super().begin(prompt_ids)
        self._encoded = self._found = None
        self._known.forget()
        self._last_layer = self.shape.num_moe_layers

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        if not 1 <= horizon <= self._family.horizon:
            return None
        if self._found is None or token_id != self._asked_id:
            if self._encoded is not None and token_id == self._asked_id:
                return super().before_token(token_id, horizon)
            self._encoded, self._asked_id = None, token_id
            self._found = self._live.forecast(self._history.window(token_id), self._known)
            if self._found is None:
                return super().before_token(token_id, horizon)
        step = self._history.step + horizon - 1
        return Forecast(step, 0, self.shape.num_moe_layers, self._found[0][horizon - 1])

    def odds_of(self, forecast: Forecast) -> np.ndarray:
        return super().odds_of(forecast) if self._found is None else self._found[1]

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        if self._encoded is None:
            self._encoded = self._live.encoder(window, self._known)
        base = self._statistics.log_odds(window, horizon)[0]
        return self._live.scores(self._encoded, base, horizon)[None]

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        # What was seen is another token's context from now on.
        self._encoded = self._found = None
        if layer_idx <= self._last_layer:
            self._known.advance(len(topk_ids))
        self._last_layer = layer_idx
        super().observe(layer_idx, topk_ids, topk_weights, router_input)


def _checked(constants: Mapping[str, np.ndarray], shape: ModelShape) -> np.ndarray:
    from .checkpoint import take
    from .errors import PredictorError

    cluster = take(constants, "cluster", (shape.num_moe_layers, shape.num_experts))
    if cluster.min() < 0 or cluster.max() >= shape.num_experts:
        raise PredictorError("tensor 'cluster' names clusters that cannot be there")
    return cluster
