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
    reports = []
    for window in windows:
        prompt = window.topk_ids[:prompt_tokens]  # [T, L, k]
        for layer_keys in _keys(prompt, shape.num_experts).swapaxes(0, 1):
            _use(resident, np.unique(layer_keys).tolist(), num_slots)
        steps = window.topk_ids[prompt_tokens:]
        reports.append(lru_missed(steps, shape.num_experts, num_slots=num_slots, held=resident))
    return reports


def lru_missed(
    topk_ids: np.ndarray,
    num_experts: int,
    *,
    num_slots: int,
    held: OrderedDict[int, None] | None = None,
) -> np.ndarray:
    """Which look-ups [T, L, k] of decode steps one global LRU of `num_slots` misses.

    It begins with what is `held`, least recent first, and keeps it up to date.
    """
    resident = OrderedDict() if held is None else held
    missed = []
    for layers in _keys(topk_ids, num_experts).tolist():
        of_step = []
        for asked in layers:
            of_step.append([key not in resident for key in asked])
            _use(resident, asked, num_slots)
        missed.append(of_step)
    return np.array(missed, dtype=bool).reshape(topk_ids.shape)


def _keys(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    return topk_ids + np.arange(topk_ids.shape[1])[:, None] * num_experts


def _use(resident: OrderedDict[int, None], keys: Sequence[int], num_slots: int) -> None:
    for key in keys:
        resident[key] = None
        resident.move_to_end(key)
    while len(resident) > num_slots:
        resident.popitem(last=False)
