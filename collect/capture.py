"""Records what every router of a model decides: hooks that live as long as a `with` block.

Owns the hooks and the order of a token's experts. Writes no files, computes no statistics.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from .routers import Router, RouterSet, topk_weights
from .trace.columns import Probabilities, ids_dtype
from .trace.probability import encode_log8


@dataclass(frozen=True, slots=True)
class RoutingRows:
    """One pass on the host, T real tokens: what goes into a shard.

    `topk_ids` and `topk_weights` [T, L * k], by weight descending, then id; `log_probs` [T, L * E]
    coded, or None; `hidden` maps a layer to the router's inputs [T, H] in the model's dtype.
    """

    topk_ids: np.ndarray
    topk_weights: np.ndarray
    log_probs: np.ndarray | None
    hidden: dict[int, torch.Tensor]


class RouterCapture:
    """Hooks on the routers of one model; `take` hands out what the last pass decided.

    Not thread-safe: one pass at a time. Nothing stays on the model after the block, whatever
    happened.
    """

    def __init__(
        self,
        routers: RouterSet,
        *,
        probabilities: Probabilities = "log8",
        hidden_layers: Collection[int] = (),
    ) -> None:
        self._routers = routers
        self._probabilities = probabilities
        self._hidden_layers = frozenset(hidden_layers)
        self._handles: list[Any] = []
        self._outputs: list[list[tuple[torch.Tensor, ...]]] = []
        self._inputs: dict[int, list[torch.Tensor]] = {}

    def __enter__(self) -> Self:
        self.clear()
        for router in self._routers.routers:
            self._handles.append(router.module.register_forward_hook(self._hook(router)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget an unfinished pass."""
        self._outputs = [[] for _ in self._routers.routers]
        self._inputs = {layer_idx: [] for layer_idx in sorted(self._hidden_layers)}

    def take(self, keep: torch.Tensor) -> RoutingRows:
        """The rows of the pass just made where `keep` [B, T] (bool, CPU) is true; then forgets it.

        Waits for the device. ValueError where the routers did not see exactly the B * T tokens
        once.
        """
        rows = torch.nonzero(keep.reshape(-1)).squeeze(1)
        every = keep.numel()
        try:
            for router, outputs in zip(self._routers.routers, self._outputs, strict=True):
                seen = sum(len(output[-1]) for output in outputs)
                if seen != every:
                    raise ValueError(f"router {router.name!r} saw {seen} tokens of {every}")
            return self._rows(rows, every)
        finally:
            self.clear()

    def _rows(self, rows: torch.Tensor, every: int) -> RoutingRows:
        routers = self._routers
        all_kept = len(rows) == every

        def column(part: int) -> torch.Tensor:
            layers = [_joined([output[part] for output in outputs]) for outputs in self._outputs]
            device = layers[0].device
            stacked = torch.stack([layer.to(device) for layer in layers], dim=1)  # [B*T, L, ...]
            return stacked if all_kept else stacked[rows.to(device)]

        ids, weights = order_topk(column(1), column(0))
        log_probs = None
        if self._probabilities != "none":
            values = routers.log_probs(column(2))
            coded = encode_log8(values) if self._probabilities == "log8" else values.half()
            log_probs = coded.flatten(1).cpu().numpy()
        hidden = {}
        for layer_idx, pieces in self._inputs.items():
            states = _joined(pieces)
            hidden[layer_idx] = (states if all_kept else states[rows.to(states.device)]).cpu()
        narrow = ids_dtype(routers.num_experts)
        return RoutingRows(
            topk_ids=ids.flatten(1).cpu().numpy().astype(narrow),
            topk_weights=weights.flatten(1).half().cpu().numpy(),
            log_probs=log_probs,
            hidden=hidden,
        )

    def _hook(self, router: Router) -> Any:
        def record(module: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            scores, weights, ids = output
            kept = (topk_weights(weights, ids).detach(), ids.detach())
            if self._probabilities != "none":
                kept = (*kept, scores.detach())
            self._outputs[router.layer_idx].append(kept)
            if router.layer_idx in self._hidden_layers:
                states = inputs[0].detach()
                self._inputs[router.layer_idx].append(states.reshape(-1, states.shape[-1]))

        return record


def order_topk(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [..., k] reordered by weight descending, equal weights by id ascending.

    Routers need not sort (`topk(sorted=False)`), so no order may be assumed before this.
    """
    by_id = ids.argsort(dim=-1)
    ids, weights = ids.gather(-1, by_id), weights.gather(-1, by_id)
    by_weight = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, by_weight), weights.gather(-1, by_weight)


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
