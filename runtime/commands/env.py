"""`outrider env`: what a bug report and a first set-up need to know of this machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ..sizes import format_bytes
from . import options
from .display import print_json

app = typer.Typer(add_completion=False)

_PACKAGES = (
    "outrider", "torch", "transformers", "triton", "accelerate", "bitsandbytes",
    "safetensors", "numpy", "pyzmq", "pyarrow",
)  # fmt: skip


@app.command()
def env(
    model: Annotated[
        str | None, typer.Option(help="folder or hub id: say whether it fits, and how to run it")
    ] = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Versions, devices, memory and measured link speeds; with --model, whether it fits."""
    import torch

    from .. import memory
    from ..machine import cpu_name, disk_read_bandwidth, memory_read_bandwidth
    from ..models.loading import resolve_folder

    folder = resolve_folder(model, revision=revision)
    shards = sorted(folder.glob("*.safetensors"))
    disk = disk_read_bandwidth(shards[0]) if shards else None
    document: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory": {"total": memory.total_bytes(), "available": memory.available_bytes()},
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "memory_read_bytes_per_s": memory_read_bandwidth(),
        "disk_read_bytes_per_s": disk[0] if disk else None,
        "disk_read_direct": disk[1] if disk else None,
    }
    if model is not None:
        from ...collect.devices import device_memory
        from ..advice import advise, advise_collection
        from ..device import device_of

        # Experts are read into the memory of the device that a run would choose.
        device = device_of("auto")
        host = advise(folder, available_bytes=memory.available_bytes())
        free = memory.device_bytes(device.type, device.index)[0]
        found = host if device.type == "cpu" else advise(folder, available_bytes=free)
        found["device"] = str(device)
        gpus = [
            device_memory(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
        ]
        found["collect"] = advise_collection(host, gpus)
        found["text"] += found["collect"]["text"]
        document["model"] = found
    if json:
        print_json(document)
        return
    for line in _lines(document):
        typer.echo(line)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines(document: dict[str, Any]) -> list[str]:
    cpu, memory = document["cpu"], document["memory"]
    disk = document["disk_read_bytes_per_s"]
    lines = [
        f"python     {document['python']} on {document['platform']}",
        "packages   "
        + ", ".join(f"{name} {found or 'absent'}" for name, found in document["packages"].items()),
        f"cpu        {cpu['name']}, {cpu['threads']} threads, {cpu['capability']}",
        f"memory     {format_bytes(memory['total'])}, {format_bytes(memory['available'])} "
        "available",
        f"devices    {', '.join(document['devices']) or 'no GPU'}",
        f"memory read {document['memory_read_bytes_per_s'] / 1e9:.1f} GB/s",
        "disk read  "
        + (
            f"{disk / 1e9:.2f} GB/s ({'direct' if document['disk_read_direct'] else 'buffered'})"
            if disk
            else "not measured: the model's first shard is too small"
        ),
    ]
    if "model" in document:
        lines += document["model"]["text"]
    return lines
