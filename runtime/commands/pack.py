"""`outrider pack`: a model's experts into an expert store of another format, and its cost."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import FORMATS
from ..errors import OutriderError, UsageError
from ..sizes import format_bytes
from . import options
from .display import print_json, progress_bars, stderr_console
from .startup import heavy_imports

if TYPE_CHECKING:
    from ..experts.store import ExpertStore
    from ..models.loading import LoadedModel
    from ..perplexity import Comparison

app = typer.Typer(add_completion=False)

# Experts that are read and computed with, twice, in less time than they were packed in.
CHEAP_BYTES = 2 << 30


@app.command()
def pack(
    model: options.Model = None,
    format: Annotated[str, typer.Option(help="int8, int4, nf4, bf16, fp16 or fp32")] = "int8",
    out: Annotated[Path | None, typer.Option(help="folder of the store to write")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a store that is there")] = False,
    perplexity: Annotated[
        bool | None,
        typer.Option(
            "--perplexity/--no-perplexity",
            help="measure perplexity on held-out text before and after [if the experts are small]",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Pack a model's experts into a store of another format.

    Never holds more than one layer's experts. Interrupted, it goes on where it was when it is
    called again.

    Then compares the perplexity of the checkpoint and of the store on text that is held out from
    all training: the model runs twice, within the memory that outrider generate would take.
    """
    if out is None:
        raise UsageError("no folder to write: give --out DIR")
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown; accepted: {', '.join(FORMATS)}")
    with heavy_imports():
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
        compared = None
        if perplexity is not False:
            compared = _compare(loaded, store, is_asked=bool(perplexity), progress=progress)
    if json:
        print_json(
            {
                "path": str(store.path),
                "format": store.format,
                "experts": store.shape.num_routed_experts,
                "bytes": store.total_bytes,
                "bytes_per_expert": store.nbytes,
                "fingerprint": fingerprint,
                "perplexity": None if compared is None else compared.as_dict(),
            }
        )
        return
    typer.echo(
        f"{store.path}: {store.shape.num_routed_experts} experts as {store.format}, "
        f"{format_bytes(store.total_bytes)}; use it with --store {store.path}"
    )
    if compared is not None:
        typer.echo(
            f"perplexity {compared.checkpoint:.4g} as the checkpoint, {compared.packed:.4g} as "
            f"{store.format}: times {compared.ratio:.4f}"
        )


def _compare(
    loaded: "LoadedModel",
    store: "ExpertStore",
    *,
    is_asked: bool,
    progress: Callable[[str, int, int], None],
) -> "Comparison | None":
    from ..models.loading import load_tokenizer
    from ..perplexity import NUM_TOKENS, compare

    def note(text: str) -> None:
        stderr_console().print(text, soft_wrap=True)

    nbytes = loaded.expert_bytes
    if nbytes > CHEAP_BYTES and not is_asked:
        note(
            f"perplexity not measured: {NUM_TOKENS} tokens would run through "
            f"{format_bytes(nbytes)} of experts, and through the packed ones; --perplexity does it"
        )
        return None
    try:
        tokenizer = load_tokenizer(loaded.folder)
        note(
            f"comparing perplexity on {NUM_TOKENS} tokens of held-out text: {format_bytes(nbytes)} "
            f"of experts as the checkpoint, then {format_bytes(store.total_bytes)} as "
            f"{store.format} (--no-perplexity leaves it out)"
        )
        return compare(
            loaded, store, tokenizer=tokenizer, scratch=store.path.parent, progress=progress
        )
    except OutriderError as error:
        # The store is made and sound; only who asked for the figure is failed for the lack of it.
        if is_asked:
            raise
        note(f"perplexity not measured: {error}")
        return None
