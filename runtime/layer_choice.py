"""What a layer of a pass has chosen, as the host sees it and as the device does."""

from dataclasses import dataclass

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
