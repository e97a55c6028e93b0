"""The options of training, their accepted ranges, and the named presets. Knows no family."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from .errors import SettingsError

if TYPE_CHECKING:
    from .examples import Examples

Loss = Literal["bce", "softmax", "focal"]
Features = Literal["routing", "hidden"]
Curriculum = Literal["none", "frequent-first"]
Precision = Literal["no", "bf16", "fp16"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a predictor is trained; families ignore what does not concern them.

    `context` tokens are seen before the one that is forecast; `horizon` is the furthest token
    forecast. `width`, `layers` and `heads` size the encoder, `clusters` the groups of experts of a
    layer. `balanced` weighs rare experts up; `auxiliary_weight` weighs
    the loss of the cluster head, or of the confidence head.
    `patience` epochs without a better validation loss end the training.
    """

    preset: str = "small"
    context: int = 4
    horizon: int = 2
    features: Features = "hidden"
    lr: float = 2e-3
    weight_decay: float = 0.015
    dropout: float = 0.15
    clip: float = 0.5
    epochs: int = 8
    batch_size: int = 512
    patience: int = 2
    loss: Loss = "bce"
    balanced: bool = False
    auxiliary_weight: float = 0.1
    curriculum: Curriculum = "none"
    precision: Precision = "no"
    checkpointing: bool = False
    width: int = 128
    layers: int = 1
    heads: int = 4
    clusters: int = 8
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    # Chosen by measurement on the built-in model: bench/LOG.md.
    "small": {"width": 256, "dropout": 0.05, "epochs": 4, "batch_size": 1024},
    # The encoder of the first write-up, with its learning rate for large models.
    "large": {"width": 512, "layers": 4, "heads": 8, "lr": 5e-5, "epochs": 20, "batch_size": 256},
}
# The same model on a card: bf16, which both have units for, and batches that fill them. Chosen by
# their memory (24 and 48 GB), not measured.
PRESETS["rtx3090"] = {**PRESETS["large"], "precision": "bf16", "batch_size": 2048, "lr": 1.5e-4}
PRESETS["a6000"] = {**PRESETS["large"], "precision": "bf16", "batch_size": 4096, "lr": 2e-4}

_RANGES: dict[str, tuple[float, float]] = {
    "context": (1, 64),
    "horizon": (1, 2),
    "lr": (1e-8, 1.0),
    "weight_decay": (0.0, 1.0),
    "dropout": (0.0, 0.9),
    "clip": (1e-6, 1e6),
    "epochs": (1, 10_000),
    "batch_size": (1, 1_048_576),
    "patience": (1, 10_000),
    "auxiliary_weight": (0.0, 100.0),
    "width": (8, 8192),
    "layers": (1, 64),
    "heads": (1, 64),
    "clusters": (1, 1024),
    "seed": (0, 2**31 - 1),
}


def make_settings(preset: str = "small", given: Mapping[str, Any] | None = None) -> Settings:
    """The preset with the `given` values (None: not given). SettingsError names field and range."""
    if preset not in PRESETS:
        raise SettingsError(f"preset {preset!r} is unknown; known ones: {', '.join(PRESETS)}")
    values = PRESETS[preset] | {
        name: value for name, value in (given or {}).items() if value is not None
    }
    try:
        settings = msgspec.convert({"preset": preset, **values}, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{_choices(values)}{error}") from None
    for name, (low, high) in _RANGES.items():
        value = getattr(settings, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise SettingsError(f"{name} is {value}; accepted is {low:g} to {high:g}")
    if settings.width % settings.heads:
        raise SettingsError(
            f"width {settings.width} is no multiple of heads {settings.heads}; choose one that is"
        )
    return settings


def begun_with(examples: "Examples", settings: Settings) -> dict[str, Any]:
    """What a training run that goes on must have in common with the one that was interrupted."""
    return {
        "settings": msgspec.to_builtins(settings),
        "sources": list(examples.sources),
        "tokens": len(examples),
    }


def _choices(values: Mapping[str, Any]) -> str:
    """Says what a word may be, which the decoder's own message leaves out."""
    for name, kind in (
        ("loss", Loss),
        ("features", Features),
        ("curriculum", Curriculum),
        ("precision", Precision),
    ):
        if name in values and values[name] not in get_args(kind):
            return f"{name} {values[name]!r}: accepted are {', '.join(get_args(kind))}; "
    return ""
