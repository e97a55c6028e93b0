"""What to collect, and how large that will be. Sizes come from the model's shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import SettingsError
from .schema import ModelShape
from .trace.columns import PROBABILITIES, Probabilities, ids_dtype

_SHARD_BYTES = 48 << 20
_MAX_SHARD_SAMPLES = 1024
# So many at least, where several workers share them: the last one leaves others idle for a sixth.
_SHARDS_A_WORKER = 6


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """What to collect. `hidden_states` is "none", "ensemble" (middle and last layer), "all" or
    layers.

    `batch_size` None takes the device's own; `samples_per_shard` None aims at 48 MiB before
    packing. `num_workers` share the shards. SettingsError where a value is out of range.
    """

    traces: int
    context_tokens: int = 64
    batch_size: int | None = None
    hidden_states: str | Sequence[int] = "ensemble"
    probabilities: Probabilities = "log8"
    seed: int = 0
    samples_per_shard: int | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("traces", "batch_size", "samples_per_shard", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; accepted are 1 and more")
        if self.probabilities not in PROBABILITIES:
            raise SettingsError(
                f"probabilities {self.probabilities!r}; accepted are {', '.join(PROBABILITIES)}"
            )


def hidden_layers(asked: str | Sequence[int], num_moe_layers: int) -> tuple[int, ...]:
    """Which Mixture-of-Experts layers' router inputs are kept. SettingsError for unknown ones."""
    if asked == "none":
        return ()
    if asked == "ensemble":
        return tuple(sorted({num_moe_layers // 2, num_moe_layers - 1}))
    if asked == "all":
        return tuple(range(num_moe_layers))
    accepted = f"none, ensemble, all, or layers from 0 to {num_moe_layers - 1} such as 0,3"
    try:
        parts = asked.split(",") if isinstance(asked, str) else asked
        layers = tuple(sorted({int(layer) for layer in parts}))
    except ValueError:
        raise SettingsError(f"hidden states {asked!r}; accepted are {accepted}") from None
    if any(not 0 <= layer < num_moe_layers for layer in layers):
        raise SettingsError(f"hidden states {asked!r}; accepted are {accepted}")
    return layers


def estimate_bytes(shape: ModelShape, settings: CollectSettings, *, state_bytes: int = 2) -> int:
    """Bytes of the traces before packing (rows pack to about 0.7-0.8 of it), hidden states
    included.
    """
    hidden = hidden_layers(settings.hidden_states, shape.num_moe_layers)
    tokens = settings.traces * settings.context_tokens
    return tokens * _token_bytes(shape, settings.probabilities, len(hidden), state_bytes)


def _token_bytes(
    shape: ModelShape, probabilities: Probabilities, num_hidden: int, state_bytes: int
) -> int:
    cells = shape.num_moe_layers * shape.top_k
    log_probs = {"log8": 1, "fp16": 2, "none": 0}[probabilities]
    return (
        cells * (ids_dtype(shape.num_experts).itemsize + 2)
        + shape.num_moe_layers * shape.num_experts * log_probs
        + num_hidden * shape.hidden_size * state_bytes
        + 8
    )


def samples_per_shard(
    shape: ModelShape, settings: CollectSettings, hidden: Sequence[int], batch_size: int
) -> int:
    """Samples of one shard: whole batches up to about 48 MiB before packing, 1024 samples
    at most.

    For several workers fewer, so that each gets some shards; still whole batches, so the batches
    and with them the rows stay the same.
    """
    a_token = _token_bytes(shape, settings.probabilities, len(hidden), 2)
    fitting = _SHARD_BYTES // (a_token * settings.context_tokens)
    batches = max(min(fitting, _MAX_SHARD_SAMPLES) // batch_size, 1)
    if settings.num_workers > 1:
        share = settings.traces // (settings.num_workers * _SHARDS_A_WORKER * batch_size)
        batches = min(batches, max(share, 1))
    return batches * batch_size
