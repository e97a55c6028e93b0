"""What an expert is chosen for: the tokens and the places in text where its weight is largest.

Keeps a few places an expert while traces stream by. Knows token ids; text is somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..trace.batch import TraceBatch

CONTEXTS_PER_EXPERT = 5
_REACH = 12


@dataclass(frozen=True, slots=True)
class Place:
    """One use of an expert: its weight, and the tokens before, at and after it within the
    sample.
    """

    weight: float
    dataset: str
    sample_id: int
    before: tuple[int, ...]
    token_id: int
    after: tuple[int, ...]


class ExpertContexts:
    """The places of largest weight of every expert, at most one a document."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._found: list[list[dict[int, Place]]] = [
            [{} for _ in range(num_experts)] for _ in range(num_layers)
        ]
        self._least = np.zeros((num_layers, num_experts), dtype=np.float32)

    def add(self, batch: TraceBatch) -> None:
        """Look at one batch; needs the weights."""
        if batch.topk_weights is None:
            return
        for layer_idx, found in enumerate(self._found):
            ids = batch.topk_ids[:, layer_idx]
            weights = batch.topk_weights[:, layer_idx].astype(np.float32)
            rows, ranks = np.nonzero(weights > self._least[layer_idx][ids])
            # The largest first: most of the others are then below what is already held.
            order = np.argsort(-weights[rows, ranks], kind="stable")
            for row, rank in zip(rows[order].tolist(), ranks[order].tolist(), strict=True):
                expert, weight = int(ids[row, rank]), float(weights[row, rank])
                if weight > self._least[layer_idx, expert]:
                    self._keep(found[expert], batch, row, weight=weight)
                    if len(found[expert]) >= CONTEXTS_PER_EXPERT:
                        least = min(place.weight for place in found[expert].values())
                        self._least[layer_idx, expert] = least

    def places(self, layer_idx: int, expert_idx: int) -> list[Place]:
        """An expert's places, the largest weight first."""
        found = self._found[layer_idx][expert_idx].values()
        return sorted(found, key=lambda place: (-place.weight, place.sample_id))

    def _keep(self, held: dict[int, Place], batch: TraceBatch, row: int, *, weight: float) -> None:
        document = int(batch.document_id[row])
        if document in held and held[document].weight >= weight:
            return
        sample = int(np.searchsorted(batch.sample_offsets, row, side="right")) - 1
        start, end = batch.sample_offsets[sample], batch.sample_offsets[sample + 1]
        tokens = batch.token_id
        held[document] = Place(
            weight=weight,
            dataset=batch.dataset_names[int(batch.dataset[row])],
            sample_id=int(batch.sample_id[row]),
            before=tuple(tokens[max(start, row - _REACH) : row].tolist()),
            token_id=int(tokens[row]),
            after=tuple(tokens[row + 1 : min(end, row + 1 + _REACH)].tolist()),
        )
        if len(held) > CONTEXTS_PER_EXPERT:
            del held[min(held, key=lambda key: held[key].weight)]
