"""How a layer's state becomes the router inputs of later layers: one small network a layer.

Corrects the later layers' own gates from this layer's state and choice, the state before it, and
the later layers' states at the previous token. Knows no forecast before the token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from .checkpoint import take
from .half_matrix import HalfMatrix
from .in_pass import gate_logits, later_layers
from .presets import begun_with

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal
    from .lookahead import Gate
    from .presets import Settings

NUM_LINEAR, NUM_GELU = 64, 192
"""Hidden units: linear ones for what least squares would find, the others for what bends."""

FAR = 3
"""Beside the next layer's, the state this many layers on at the previous token is read."""

PART = "drift"
HALF = 65504.0
WARMUP_STEPS = 100
LAST_RATE = 0.02
_GELU_SLOPE = 1.702


def bent(values: np.ndarray) -> np.ndarray:
    """x * sigmoid(1.702 x), the sigmoid form of GELU (D. Hendrycks, K. Gimpel, 2016)."""
    half = np.tanh(values * (0.5 * _GELU_SLOPE))
    half += 1.0
    half *= values
    half *= 0.5
    return half


@dataclass(frozen=True, slots=True)
class Stage:
    """The network of one layer: logits[l + d] = gates[l + d] @ x + up @ hidden(features) + offset.

    `inner` [units, F] and `inner_offset` [units] take raw features; `up` [D * E, units].
    """

    inner: np.ndarray
    inner_offset: np.ndarray
    up: np.ndarray
    offset: np.ndarray

    def corrections(self, features: np.ndarray) -> np.ndarray:
        """[N, D * E] to be added to the gates' logits, of features [N, F]."""
        return _corrections(features @ self.inner.T, self, lambda units: units @ self.up.T)


class LiveStage:
    """A stage for one row at a time, its matrices in fp16."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.inner, self.up = HalfMatrix(stage.inner), HalfMatrix(stage.up)

    def corrections(self, features: np.ndarray) -> np.ndarray:
        """As `Stage.corrections`, to fp16's rounding."""
        return _corrections(self.inner(features), self._stage, self.up)


def _corrections(
    units: np.ndarray, stage: Stage, up: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    units += stage.inner_offset
    units[:, NUM_LINEAR:] = bent(units[:, NUM_LINEAR:])
    corrections = up(units)
    corrections += stage.offset
    return corrections


def own_choice(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Softmax shares [N, E] of the layer's own logits, zero below the top_k highest."""
    edge = logits.shape[1] - top_k
    least = np.partition(logits, edge, axis=1)[:, edge : edge + 1]
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    share[logits < least] = 0.0
    return share


def past_layers(shape: ModelShape, layer_idx: int) -> tuple[int, int]:
    """The two layers whose states at the previous token a stage reads."""
    last = shape.num_moe_layers - 1
    return min(layer_idx + 1, last), min(layer_idx + FAR, last)


def num_features(shape: ModelShape) -> int:
    """State, choice, the state one layer before, and two states of the previous token."""
    return 4 * shape.hidden_size + shape.num_experts


def features_of(
    examples: Examples, rows: np.ndarray, layer_idx: int, gates: Sequence[Gate]
) -> np.ndarray:
    """[N, F] float32 of recorded rows; what is not there (no token or layer before) is zero."""
    state = examples.hidden[layer_idx][rows].astype(np.float32)
    choice = own_choice(gate_logits(gates[layer_idx], state), examples.shape.top_k)
    if layer_idx:
        before = examples.hidden[layer_idx - 1][rows].astype(np.float32)
    else:
        before = np.zeros_like(state)
    is_first = examples.position[rows] == 0
    past = np.maximum(rows - 1, 0)
    states = [examples.hidden[one][past] for one in past_layers(examples.shape, layer_idx)]
    joined = np.concatenate([one.astype(np.float32) for one in states], axis=1)
    joined[is_first] = 0.0
    return np.concatenate([state, choice, before, joined], axis=1)


def fit_stages(
    examples: Examples,
    gates: Sequence[Gate],
    *,
    settings: Settings,
    progress: Journal,
) -> list[Stage]:
    """Fit every layer's network but the last's. Blocks for minutes; goes on where a resume may.

    Least squares on the later layers' logits, freed of each row's level, which chooses nothing:
    they say more of a near miss than the set of the chosen does.
    """
    begun = begun_with(examples, settings)
    stages, resumed = [], progress.load(PART, begun_with=begun)
    kept = {} if resumed is None else resumed[0]
    layers = examples.shape.num_moe_layers
    for layer_idx in range(layers - 1):
        stage = stage_of(kept, layer_idx, examples.shape) if f"{layer_idx}.up" in kept else None
        if stage is None:
            stage = _fit_stage(examples, gates, layer_idx, settings=settings, progress=progress)
            kept |= state_of(stage, layer_idx)
            progress.save(PART, kept, begun)
        stages.append(stage)
    return stages


def state_of(stage: Stage, layer_idx: int) -> dict[str, np.ndarray]:
    """The stage's tensors by name."""
    return {
        f"{layer_idx}.{name}": getattr(stage, name).astype(np.float16) for name in Stage.__slots__
    }


def stage_of(tensors: Mapping[str, np.ndarray], layer_idx: int, shape: ModelShape) -> Stage:
    """The inverse of `state_of`. PredictorError names what is missing or misshapen."""
    units = NUM_LINEAR + NUM_GELU
    outputs = len(later_layers(shape, layer_idx)) * shape.num_experts
    sizes = {
        "inner": (units, num_features(shape)),
        "inner_offset": (units,),
        "up": (outputs, units),
        "offset": (outputs,),
    }
    parts = {
        name: take(tensors, f"{layer_idx}.{name}", size).astype(np.float32)
        for name, size in sizes.items()
    }
    return Stage(**parts)


def _fit_stage(
    examples: Examples,
    gates: Sequence[Gate],
    layer_idx: int,
    *,
    settings: Settings,
    progress: Journal,
) -> Stage:
    import torch

    generator = np.random.default_rng(settings.seed + layer_idx)
    torch.manual_seed(settings.seed + layer_idx)
    shape, rows = examples.shape, len(examples)
    targets = later_layers(shape, layer_idx)
    probe = np.sort(generator.permutation(rows)[:8192])
    seen = features_of(examples, probe, layer_idx, gates)
    mean, spread = seen.mean(axis=0), seen.std(axis=0) + 1e-3
    wanted = _residuals(examples, probe, layer_idx, gates)
    level = wanted.mean(axis=0)
    size = np.repeat(
        wanted.reshape(len(probe), len(targets), -1).std(axis=(0, 2)), shape.num_experts
    )
    size = size.astype(np.float32) + 1e-6
    units, outputs = NUM_LINEAR + NUM_GELU, len(targets) * shape.num_experts
    inner = torch.nn.Linear(len(mean), units)
    up = torch.nn.Linear(units, outputs)
    torch.nn.init.zeros_(up.bias)
    with torch.no_grad():
        up.weight.mul_(0.1)
    parameters = [*inner.parameters(), *up.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    epochs = (settings.epochs + 1) // 2
    batch = min(settings.batch_size, rows)
    steps, done, shown = max(1, epochs * rows // batch), 0, 0.0
    while done < steps:
        order = generator.permutation(rows)
        for start in range(0, rows - batch + 1, batch):
            picked = order[start : start + batch]
            features = (features_of(examples, picked, layer_idx, gates) - mean) / spread
            target = (_residuals(examples, picked, layer_idx, gates) - level) / size
            rate = min(1.0, (done + 1) / WARMUP_STEPS) * max(LAST_RATE, 1.0 - done / steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate
            hidden = inner(torch.from_numpy(features.astype(np.float32)))
            gelu = hidden[:, NUM_LINEAR:]
            gelu = gelu * torch.sigmoid(_GELU_SLOPE * gelu)
            found = up(torch.cat([hidden[:, :NUM_LINEAR], gelu], dim=1))
            loss = torch.nn.functional.mse_loss(found, torch.from_numpy(target.astype(np.float32)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            shown, done = float(loss.detach()), done + 1
            if done % 50 == 0:
                progress(f"learning the drift from layer {layer_idx}", done, steps)
            if done >= steps:
                break
    progress.record(stage=layer_idx, loss=shown, steps=done)
    weights = [one.detach().numpy() for one in (inner.weight, inner.bias, up.weight, up.bias)]
    parts = (
        weights[0] / spread,
        weights[1] - (weights[0] / spread) @ mean,
        weights[2] * size[:, None],
        weights[3] * size + level,
    )
    # As a checkpoint keeps them, so that a saved predictor answers as this one does.
    return Stage(
        *(np.clip(one, -HALF, HALF).astype(np.float16).astype(np.float32) for one in parts)
    )


def _residuals(
    examples: Examples, rows: np.ndarray, layer_idx: int, gates: Sequence[Gate]
) -> np.ndarray:
    """[N, D * E]: how far the later gates' true logits are from theirs on this layer's state."""
    state = examples.hidden[layer_idx][rows].astype(np.float32)
    parts = []
    for target in later_layers(examples.shape, layer_idx):
        later = examples.hidden[target][rows].astype(np.float32)
        residual = gate_logits(gates[target], later - state)
        parts.append(residual - residual.mean(axis=1, keepdims=True))
    return np.concatenate(parts, axis=1)
