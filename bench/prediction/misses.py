"""Which look-ups a least-recently-used cache misses: what `recall_on_misses` is counted over."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ...collect.schema import ModelShape
from .windows import Window

BUDGETS = {"10%": 0.10, "25%": 0.25, "50%": 0.50}
"""Shares of all routed experts, by their names in the rows."""


def missed_look_ups(
    windows: Sequence[Window], shape: ModelShape, *, share: float, prompt_tokens: int
) -> list[np.ndarray]:
    """For each window bool [T - prompt_tokens, L, k]: the decode step's look-up was a miss.

    One global LRU without prefetch serves all windows, one after the other. The experts of a step
    and layer are looked up together and used together; prompts pass through the cache layer by
    layer and are not reported.
    """
    num_slots = max(1, int(share * shape.num_moe_layers * shape.num_experts))
    resident: OrderedDict[int, None] = OrderedDict()

    def use(keys: Sequence[int]) -> None:
        for key in keys:
            resident[key] = None
            resident.move_to_end(key)
        while len(resident) > num_slots:
            resident.popitem(last=False)

    first_key = np.arange(shape.num_moe_layers)[:, None] * shape.num_experts
    reports = []
    for window in windows:
        keys = window.topk_ids + first_key  # [T, L, k]
        for layer_keys in keys[:prompt_tokens].swapaxes(0, 1):
            use(np.unique(layer_keys).tolist())
        steps = keys[prompt_tokens:]
        is_missed = np.zeros(steps.shape, dtype=bool)
        for step, layers in enumerate(steps.tolist()):
            for layer_idx, asked in enumerate(layers):
                is_missed[step, layer_idx] = [key not in resident for key in asked]
                use(asked)
        reports.append(is_missed)
    return reports
