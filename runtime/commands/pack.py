"""`outrider pack`: a model's experts into an expert store of another format."""

from pathlib import Path
from typing import Annotated

import typer

from ..config import FORMATS
from ..errors import UsageError
from ..sizes import format_bytes
from . import options
from .display import print_json, progress_bars, stderr_console

app = typer.Typer(add_completion=False)


@app.command()
def pack(
    model: options.Model = None,
    format: Annotated[str, typer.Option(help="int8, int4, nf4, bf16, fp16 or fp32")] = "int8",
    out: Annotated[Path | None, typer.Option(help="folder of the store to write")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a store that is there")] = False,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Pack a model's experts into a store of another format.

    Never holds more than one layer's experts. Interrupted, it goes on where it was when it is
    called again.
    """
    if out is None:
        raise UsageError("no folder to write: give --out DIR")
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown; accepted: {', '.join(FORMATS)}")
    from ..experts.identity import SourceIdentity
    from ..experts.pack import pack_store
    from ..models.loading import load_model, resolve_folder

    with progress_bars() as progress:
        loaded = load_model(
            resolve_folder(model, revision=revision),
            progress=lambda done, total: progress("reading dense weights", done, total),
        )
        fingerprint = loaded.weights_fingerprint(
            lambda done, total: progress("checking experts", done, total)
        )
        store = pack_store(
            out,
            shape=loaded.shape,
            fmt=format,
            layers=loaded.layer_tensors,
            source=SourceIdentity.of(
                loaded.folder, loaded.checkpoint.files, fingerprint=fingerprint
            ),
            is_transposed=loaded.layers[0].experts.is_transposed,
            overwrite=overwrite,
            progress=lambda done, total: progress("packing experts", done, total),
            on_wait=lambda folder: stderr_console().print(
                f"another process is packing into {folder}; waiting for it"
            ),
        )
    if json:
        print_json(
            {
                "path": str(store.path),
                "format": store.format,
                "experts": store.shape.num_routed_experts,
                "bytes": store.total_bytes,
                "bytes_per_expert": store.nbytes,
                "fingerprint": fingerprint,
            }
        )
        return
    typer.echo(
        f"{store.path}: {store.shape.num_routed_experts} experts as {store.format}, "
        f"{format_bytes(store.total_bytes)}; use it with --store {store.path}"
    )
