"""`outrider inspect`: what a store, trace, predictor or model folder is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidDataError
from ..sizes import format_bytes
from . import options
from .display import print_json

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="folder of a store, trace, predictor or model")],
    json: options.Json = False,
) -> None:
    """Say what a folder holds. Reads headers and indices, no weights."""
    document = describe(path)
    if json:
        print_json(document)
        return
    for name, value in document.items():
        typer.echo(f"{name:18} {_shown(name, value)}")


def describe(path: Path) -> dict[str, Any]:
    """The facts of a folder as a document; InvalidDataError if it is none of ours."""
    if not path.is_dir():
        raise InvalidDataError(f"{path} is not a folder")
    if (path / "index.json").is_file() or (path / "index.partial.json").is_file():
        return _store(path)
    if (path / "manifest.json").is_file():
        return _trace(path)
    if (path / "config.json").is_file():
        from ..models.checkpoint import read_object

        config = read_object(path / "config.json")
        return _predictor(path, config) if "family" in config else _model(path)
    raise InvalidDataError(
        f"{path} holds neither index.json (expert store), manifest.json (traces) nor config.json "
        "(model or predictor)"
    )


def _store(path: Path) -> dict[str, Any]:
    from ..experts.store import ExpertStore

    store = ExpertStore(path)
    return {
        "kind": "expert store",
        "path": str(path),
        "format": store.format,
        **_shape(store.shape),
        "experts": store.shape.num_routed_experts,
        "expert_bytes": store.nbytes,
        "total_bytes": store.total_bytes,
        "packed_from": store.source.folder,
        "changed_since": store.source.changed_files(),
    }


def _trace(path: Path) -> dict[str, Any]:
    from ...collect.trace import read_manifest

    manifest = read_manifest(path)
    return {
        "kind": "traces",
        "path": str(path),
        "model": manifest.model,
        "format": manifest.format,
        **_shape(manifest.shape),
        "context_tokens": manifest.context_tokens,
        "samples": manifest.num_samples,
        "samples_finished": manifest.num_finished,
        "complete": manifest.complete,
        "shards": len(manifest.shards),
        "datasets": [dataset.name for dataset in manifest.datasets],
    }


def _predictor(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise InvalidDataError(f"{path}: a predictor's config.json without model.safetensors")
    return {
        "kind": "predictor",
        "path": str(path),
        "family": config["family"],
        "total_bytes": weights.stat().st_size,
        "metrics": config.get("metrics"),
    }


def _model(path: Path) -> dict[str, Any]:
    import torch

    from ..models import adapter
    from ..models.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    config = adapter.load_config(path)
    model = adapter.build_on_meta(config, dtype=torch.bfloat16)
    layers = adapter.moe_layers(model)
    plan, _ = adapter.conversion_plan(model, checkpoint.tensors)
    targets = {f"{layer.name}.{name}" for layer in layers for name in layer.projections}
    names = [name for target in targets & plan.keys() for name in plan[target].names()]
    total = sum(record.nbytes for record in checkpoint.tensors.values())
    experts = sum(checkpoint.tensors[name].nbytes for name in names)
    return {
        "kind": "model",
        "path": str(path),
        "family": config.model_type,
        **_shape(adapter.routing_shape(model, layers)),
        "files": len(checkpoint.files),
        "total_bytes": total,
        "routed_expert_bytes": experts,
        "dense_bytes": total - experts,
    }


def _shape(shape: Any) -> dict[str, Any]:
    return {
        "moe_layers": shape.num_moe_layers,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "hidden_size": shape.hidden_size,
        "expert_size": shape.expert_size,
    }


def _shown(name: str, value: object) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return f"{format_bytes(value)} ({value} bytes)"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing"
    return str(value)
