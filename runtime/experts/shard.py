"""One safetensors file of equal, aligned U8 tensors: its header, written and compared.

Knows names, sizes and offsets; not experts, indexes or what the bytes mean.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InvalidDataError
from .layout import BLOCK_ALIGN

MAX_HEADER_BYTES = 100 * 10**6  # the safetensors format's own limit
_LENGTH = struct.Struct("<Q")


def shard_header(names: Sequence[str], nbytes: int, *, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: `names` in file order, each `nbytes` long and U8.

    Padded with spaces (which the format allows) so that data begins on a BLOCK_ALIGN boundary
    of the file. The same arguments give the same bytes.
    """
    if nbytes < 1 or nbytes % BLOCK_ALIGN:
        raise ValueError(f"a block of {nbytes} bytes does not end on a {BLOCK_ALIGN} boundary")
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for position, name in enumerate(names):
        begin = position * nbytes
        offsets = [begin, begin + nbytes]
        table[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    padding = -(_LENGTH.size + len(text)) % BLOCK_ALIGN
    return _LENGTH.pack(len(text) + padding) + text + b" " * padding


def check_header(path: Path, expected: bytes, *, nbytes: int) -> None:
    """Raise InvalidDataError, naming `path` and the tensor, unless the file begins with `expected`.

    Also compares the file's size with `nbytes`. Reads the header only; blocks on the disk.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = _read(file.fileno(), len(expected))
            if found == expected and size == nbytes:
                return
            if size < len(found) or len(found) < len(expected):
                raise InvalidDataError(f"{path} is cut short: {size} bytes, expected {nbytes}")
            if found != expected:
                raise InvalidDataError(f"{path}: {_header_problem(file.fileno(), size, expected)}")
    except FileNotFoundError as error:
        raise InvalidDataError(f"{path} is missing") from error
    except OSError as error:
        raise InvalidDataError(f"{path} cannot be read: {error.strerror}") from error
    what = "is cut short" if size < nbytes else "is longer than it was written"
    last = _truncated_tensor(expected, size)
    within = f" (inside {last})" if last else ""
    raise InvalidDataError(f"{path} {what}: {size} bytes{within}, expected {nbytes}")


def _read(descriptor: int, length: int, offset: int = 0) -> bytes:
    pieces = []
    while length > 0:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


def _parse(header: bytes) -> dict[str, object]:
    table = json.loads(header)
    if not isinstance(table, dict):
        raise ValueError("it is not a JSON object")
    return table


def _header_problem(descriptor: int, size: int, expected: bytes) -> str:
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size))
    if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
        return f"the header claims {length} bytes, the file has {size}"
    try:
        found = _parse(_read(descriptor, length, _LENGTH.size))
    except ValueError as error:
        return f"the header is damaged: {error}"
    wanted = _parse(expected[_LENGTH.size :])
    for name in wanted:
        if name == "__metadata__":
            continue
        if name not in found:
            others = [other for other in found if other != "__metadata__"]
            holds = f"it holds {others[0]}" if others else "it holds no tensor"
            return f"tensor {name} is not in this file, {holds}: the file belongs elsewhere"
        if found[name] != wanted[name]:
            return (
                f"the header lies about tensor {name}: {json.dumps(found[name])}, "
                f"expected {json.dumps(wanted[name])}"
            )
    surplus = [name for name in found if name not in wanted]
    if surplus:
        return f"tensor {surplus[0]} is in this file, but not in the store's index"
    if found.get("__metadata__") != wanted["__metadata__"]:
        found_text, wanted_text = (json.dumps(t.get("__metadata__")) for t in (found, wanted))
        return f"the file is another store's: its metadata is {found_text}, expected {wanted_text}"
    return "the header was rewritten: its bytes are not those that the store was sealed with"


def _truncated_tensor(expected: bytes, size: int) -> str | None:
    for name, entry in _parse(expected[_LENGTH.size :]).items():
        if name != "__metadata__" and isinstance(entry, dict):
            begin, end = (len(expected) + offset for offset in entry["data_offsets"])
            if begin <= size < end:
                return name
    return None
