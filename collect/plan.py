"""The manifest of a collection that has not begun: everything that fixes its rows, written down."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import xxhash

from .devices import batch_size_for, device_memory
from .routers import RouterSet, model_device
from .sampling import Samples
from .schema import ModelShape
from .settings import CollectSettings, hidden_layers, samples_per_shard
from .trace.columns import SCHEMA_VERSION
from .trace.manifest import DatasetEntry, Manifest


def plan_manifest(
    model: Any,
    routers: RouterSet,
    samples: Sequence[Samples],
    *,
    shape: ModelShape,
    settings: CollectSettings,
    tokenizer: Any,
    model_name: str,
    model_format: str,
) -> Manifest:
    """What `collect` writes before its first shard; asks the device for its memory."""
    device = model_device(model)
    memory = device_memory(device)
    batch_size = settings.batch_size or batch_size_for(device.type, memory.total_bytes)
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
        model=model_name,
        format=model_format,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=device.type,
        tokenizer="" if serialized is None else xxhash.xxh3_64_hexdigest(serialized.encode()),
        context_tokens=settings.context_tokens,
        seed=settings.seed,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        samples_per_shard=per_shard,
        probabilities=settings.probabilities,
        scoring=routers.scoring,
        hidden_layers=hidden,
        datasets=tuple(entries),
        software={name: _version(name) for name in ("torch", "transformers", "pyarrow", "outrider")}
        | {"device": memory.name},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def serialized_tokenizer(tokenizer: Any) -> str | None:
    """The tokenizer as its own JSON; None where it is a slow one that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
