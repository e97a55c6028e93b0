"""Local files as a corpus: text, JSON lines, CSV and Parquet, one file or a folder of them.

A .txt or .md file is one document; in the others a row is. Refuses binary, empty and wrongly
encoded files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import CorpusError
from .corpus import Corpus

_TEXT_COLUMNS = ("text", "content", "document", "body", "context")
_MAX_CSV_FIELD = 1 << 27


def local_corpus(path_name: str) -> Corpus:
    """The corpus of `PATH` or `PATH#COLUMN`. CorpusError where there is nothing to read."""
    name, _, column = path_name.partition("#")
    path = Path(name).expanduser()
    if not path.exists():
        raise CorpusError(f"text:{name} does not exist; give a file or folder of {_ACCEPTED}")
    files = _files(path)
    if not files:
        raise CorpusError(f"text:{name} holds no file of a known kind; known are {_ACCEPTED}")

    def documents() -> Iterator[str]:
        for file in files:
            yield from _READERS[file.suffix.lower()](file, column or None)

    return Corpus(f"text:{path.stem or path.resolve().name}", f"text:{path_name}", documents)


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise CorpusError(f"{str(path)!r} is of an unknown kind; known are {_ACCEPTED}")
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _READERS
    )


def _whole(path: Path, column: str | None) -> Iterator[str]:
    yield _decoded(path)


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    for number, line in enumerate(_decoded(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{str(path)!r} line {number} is not JSON: {error}") from None
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise CorpusError(
                f"{str(path)!r} line {number} is a {type(row).__name__}; expected an object or a "
                "string"
            )
        texts = [key for key, value in row.items() if isinstance(value, str)]
        yield row[_column(path, list(row), texts, column=column)]


def _comma_separated(path: Path, column: str | None) -> Iterator[str]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    rows = csv.DictReader(_decoded(path).splitlines(keepends=True))
    names = list(rows.fieldnames or ())
    chosen = _column(path, names, names if len(names) == 1 else [], column=column)
    for number, row in enumerate(rows, start=2):
        if row[chosen] is None:
            raise CorpusError(f"{str(path)!r} row {number} has no column {chosen!r}")
        yield row[chosen]


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [f.name for f in schema if f.type in (pa.string(), pa.large_string())]
            chosen = _column(path, schema.names, strings, column=column)
            for batch in file.iter_batches(batch_size=1024, columns=[chosen]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{str(path)!r} is not a Parquet file: {error}") from None


def _column(path: Path, names: Sequence[str], texts: Sequence[str], *, column: str | None) -> str:
    """The column that is the text: the one asked for, a usual name, or the only one that can be."""
    if column is not None and column in names:
        return column
    if column is None:
        for name in _TEXT_COLUMNS:
            if name in names:
                return name
        if len(texts) == 1:
            return texts[0]
    asked = f"no column {column!r}" if column else "no column that is plainly the text"
    raise CorpusError(
        f"{str(path)!r} has {asked}; it has {', '.join(map(repr, names)) or 'none'}; "
        "name one as text:PATH#COLUMN"
    )


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.strip():
        raise CorpusError(f"{str(path)!r} is empty; give a file with text")
    if b"\0" in raw[: 1 << 16]:
        raise CorpusError(f"{str(path)!r} is binary (it holds NUL bytes); give UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
            "convert it (for instance with iconv)"
        ) from None


_READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": _whole,
    ".md": _whole,
    ".jsonl": _json_lines,
    ".csv": _comma_separated,
    ".parquet": _parquet,
}
_ACCEPTED = ", ".join(_READERS)
