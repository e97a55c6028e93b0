"""The manifest of a collection that has not begun: everything that fixes its rows, written down;
and the shards into which its samples are cut.

Asks nothing of a model but its `ModelFacts`, so the model may be on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import xxhash

from .devices import DeviceMemory, batch_size_for, device_memory
from .routers import RouterSet, model_device
from .sampling import Samples
from .schema import ModelShape
from .settings import CollectSettings, hidden_layers, samples_per_shard
from .trace.columns import SCHEMA_VERSION
from .trace.encoding import safetensors_bytes
from .trace.manifest import DatasetEntry, Manifest


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a collection records of its model. `routers` is the file of the routers' own tensors,
    `state_bytes` the size of one number of a hidden state, `software` a version by package,
    `kernels` what computes its passes.
    """

    name: str
    format: str
    shape: ModelShape
    dtype: str
    state_bytes: int
    device: str
    memory: DeviceMemory
    threads: int
    scoring: str
    routers: bytes
    software: dict[str, str]
    kernels: str


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The samples of one shard, to be run through the model; `first_sample` counts over all data
    sets.
    """

    first_sample: int
    samples: Samples


def describe_model(
    model: Any, routers: RouterSet, *, shape: ModelShape, name: str, format: str, kernels: str
) -> ModelFacts:
    """The facts of a ready model. Asks its device for its memory."""
    device = model_device(model)
    weight = next(model.parameters())
    return ModelFacts(
        name=name,
        format=format,
        shape=shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        state_bytes=weight.element_size(),
        device=device.type,
        memory=device_memory(device),
        threads=torch.get_num_threads(),
        scoring=routers.scoring,
        routers=safetensors_bytes(*routers.tensors()),
        software=software_versions(),
        kernels=kernels,
    )


def plan_manifest(
    facts: ModelFacts, samples: Sequence[Samples], *, settings: CollectSettings, tokenizer: Any
) -> Manifest:
    """What is written before the first shard."""
    shape = facts.shape
    batch_size = settings.batch_size or batch_size_for(facts.device, facts.memory.total_bytes)
    hidden = hidden_layers(settings.hidden_states, shape.num_moe_layers)
    per_shard = settings.samples_per_shard or samples_per_shard(shape, settings, hidden, batch_size)
    entries, first = [], 0
    for chosen in samples:
        entries.append(
            DatasetEntry(
                name=chosen.name,
                source=chosen.source,
                first_sample=first,
                num_samples=len(chosen),
                num_tokens=chosen.num_tokens,
                num_documents=chosen.num_documents,
                digest=chosen.digest(),
            )
        )
        first += len(chosen)
    serialized = serialized_tokenizer(tokenizer)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        shape=shape,
        model=facts.name,
        format=facts.format,
        dtype=facts.dtype,
        device=facts.device,
        tokenizer="" if serialized is None else xxhash.xxh3_64_hexdigest(serialized.encode()),
        context_tokens=settings.context_tokens,
        seed=settings.seed,
        batch_size=batch_size,
        threads=facts.threads,
        samples_per_shard=per_shard,
        probabilities=settings.probabilities,
        scoring=facts.scoring,
        hidden_layers=hidden,
        datasets=tuple(entries),
        software=facts.software | {"device": facts.memory.name},
        kernels=facts.kernels,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def plan_shards(manifest: Manifest, samples: Sequence[Samples]) -> Iterator[ShardTask]:
    """The shards that the manifest does not list yet, in sample order; views, no copies."""
    finished = {shard.first_sample for shard in manifest.shards}
    for chosen, entry in zip(samples, manifest.datasets, strict=True):
        for start in range(0, len(chosen), manifest.samples_per_shard):
            if entry.first_sample + start not in finished:
                end = min(start + manifest.samples_per_shard, len(chosen))
                yield ShardTask(entry.first_sample + start, chosen.part(start, end))


def software_versions() -> dict[str, str]:
    """The packages whose version may change a row or a file."""
    return {name: _version(name) for name in ("torch", "transformers", "pyarrow", "outrider")}


def serialized_tokenizer(tokenizer: Any) -> str | None:
    """The tokenizer as its own JSON; None where it is a slow one that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
