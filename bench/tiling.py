"""Routing recorded from one model, laid over the layers of another. One rule, stated here.

Layer l of the target follows recorded layer floor(l L / L'): each target layer has experts of its
own, so nothing is shared between the copies of a layer but their routing. What was forecast for a
recorded layer is forecast for its copies; what was forecast *in* a recorded layer is said in the
last of its copies. Experts are not mapped: each target layer keeps the recorded E and k, and an
expert carries k' / k times the target expert's bytes and arithmetic, so that a token moves and
computes as much as in the target; a budget is a share of all experts in both.
"""

from dataclasses import replace

import numpy as np

from .foretold import Foretold
from .routing import Routing

RULE = (
    "target layer l follows recorded layer floor(l * L / L'); experts keep the recorded number and "
    "top-k, each scaled so that a token's routed bytes are the target's; budgets are shares of all "
    "experts"
)


def layer_map(recorded: int, target: int) -> np.ndarray:
    """Recorded layer of each target layer, ascending."""
    return np.arange(target) * recorded // target


def tile_routing(routing: Routing, num_layers: int) -> Routing:
    """The routing of a model with `num_layers` MoE layers by the rule above."""
    layers = layer_map(routing.shape.num_moe_layers, num_layers)
    return replace(
        routing,
        shape=replace(routing.shape, num_moe_layers=num_layers, fingerprint=""),
        topk_ids=routing.topk_ids[:, layers],
        topk_weights=routing.topk_weights[:, layers],
        hidden={},
        gates=None,
    )


def tile_foretold(foretold: Foretold, num_layers: int) -> Foretold:
    """The forecasts that belong to `tile_routing`'s."""
    before = foretold.before
    recorded = _recorded_layers(foretold)
    layers = layer_map(recorded, num_layers)
    said: dict[int, np.ndarray] = {}
    for layer_idx, told in foretold.layers.items():
        copies = np.flatnonzero(layers == layer_idx)
        later = layers[copies[-1] + 1 :] - layer_idx - 1 if len(copies) else np.array([], int)
        later = later[later < told.shape[1]]
        if len(later):
            said[int(copies[-1])] = told[:, later]
    return replace(foretold, before=None if before is None else before[:, :, layers], layers=said)


def _recorded_layers(foretold: Foretold) -> int:
    if foretold.before is not None:
        return foretold.before.shape[2]
    return 1 + max(layer_idx + told.shape[1] for layer_idx, told in foretold.layers.items())
