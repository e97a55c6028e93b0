"""What every source of text is to the sampler: a name and its documents, as often as asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Corpus:
    """`documents()` starts a new pass over whole documents; `source` says where they come from.

    The order of a pass does not matter to a sample. CorpusError while opening or iterating.
    """

    name: str
    source: str
    documents: Callable[[], Iterator[str]]
