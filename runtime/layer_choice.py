"""What a layer of a pass has chosen, as the host sees it and as the device does; rows by expert."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """T rows, K experts each, H hidden.

    On the host: ids [T, K] int64, weights [T, K] fp32, and states [T, H], what the router saw,
    wherever it is cheapest to look at. On the device: hidden_states [T, H] and the router's
    topk_ids and topk_weights [T, K].
    """

    ids: np.ndarray
    weights: Tensor
    states: Tensor
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def kept(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """ids, weights and states of one's own: the next pass overwrites these."""
        return self.ids.copy(), self.weights.clone(), self.states.clone()


def rows_by_expert(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Flat positions t * K + k by expert, experts ascending and positions ascending."""
    if ids.shape[0] == 1:  # a token's experts are distinct, and sorting six needs no numpy
        chosen = ids[0].tolist()
        ranked = sorted(range(len(chosen)), key=chosen.__getitem__)
        return {chosen[position]: np.array([position]) for position in ranked}
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    experts = flat[order]
    starts = np.flatnonzero(experts[1:] != experts[:-1]) + 1
    bounds = [0, *starts.tolist(), len(order)]
    return {int(experts[start]): order[start:end] for start, end in pairwise(bounds)}
