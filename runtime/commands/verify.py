"""`outrider verify`: every checksum of an expert store."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidDataError
from . import options
from .display import print_json, progress_bars

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="folder of the expert store")],
    json: options.Json = False,
) -> None:
    """Check every checksum of an expert store; exit code 3 if one does not hold."""
    from ..experts.store import ExpertStore

    opened = ExpertStore(store)
    with progress_bars() as progress:
        damaged = opened.verify(lambda done, total: progress("verifying experts", done, total))
    if json:
        print_json(
            {
                "path": str(store),
                "experts": opened.shape.num_routed_experts,
                "damaged": [list(key) for key in damaged],
            }
        )
    if damaged:
        shards = sorted({opened.layout(key).extents[0].file.name for key in damaged})
        raise InvalidDataError(
            f"{store}: {len(damaged)} of {opened.shape.num_routed_experts} experts are damaged, in "
            f"{', '.join(shards)}; delete these files and pack the model into this folder again, "
            "which makes the missing ones anew"
        )
    if not json:
        typer.echo(f"{store}: all {opened.shape.num_routed_experts} experts are sound")
