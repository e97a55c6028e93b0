"""Makes outrider-nano, the default model; run from the root of the repository."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

CORPORA = Path("build/corpora")
BUILD = Path("build/nano")
TOKENS = BUILD / "tokens"
MODEL = Path("runtime/models/nano")
SAMPLE = Path("collect/corpora/sample")

Tokens = Annotated[int, typer.Option(help="tokens to see in all")]
DecayFraction = Annotated[
    float, typer.Option(help="the share of the run in which the learning rates fall to zero")
]
Until = Annotated[
    datetime | None, typer.Option(help="local time by which the run has ended, decay included")
]
Out = Annotated[Path, typer.Option(help="folder to write")]


@app.command()
def corpus() -> None:
    """Download the packages, learn the vocabulary, encode the documents."""
    from . import corpus as corpora
    from . import tokenizer

    tokenizer.prepare(corpora.fetch(CORPORA), TOKENS)


@app.command()
def train(
    tokens: Tokens = 9_000_000, decay_fraction: DecayFraction = 0.3, until: Until = None
) -> None:
    """Train, or go on training. SIGUSR1 makes it decay at once and end; SIGTERM saves and stops."""
    from .train import Plan, Trainer

    corpus()
    plan = Plan(
        tokens=tokens, decay_fraction=decay_fraction, until=until.timestamp() if until else None
    )
    if not Trainer(TOKENS, BUILD, plan).run():
        raise typer.Exit(1)


@app.command()
def export(out: Out = BUILD / "export") -> None:
    """Write the last saved state as a checkpoint folder."""
    from .export import export as export_state

    export_state(BUILD / "state.safetensors", TOKENS, out)


@app.command()
def card(out: Out = MODEL) -> None:
    """Measure the checkpoint in a folder on test documents and write its README.md."""
    from .card import write

    write(out, TOKENS)


@app.command()
def sample(out: Out = SAMPLE) -> None:
    """Write the freely licensed text sample."""
    from . import corpus as corpora
    from .sample import write

    write(corpora.fetch(CORPORA), out)


@app.command()
def predictor(out: Out = MODEL / "predictor") -> None:
    """Collect traces of the built-in model, train its predictor, print the table, ship it."""
    from .predictor import make

    make(CORPORA, BUILD / "predictor", out)


@app.command(name="all")
def everything(
    tokens: Tokens = 9_000_000,
    decay_fraction: DecayFraction = 0.3,
    until: Until = None,
    out: Out = MODEL,
) -> None:
    """Package downloads to weights and card. Interrupted, it goes on where it was."""
    train(tokens, decay_fraction, until)
    export(out)
    card(out)


if __name__ == "__main__":
    app()
