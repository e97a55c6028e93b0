"""Which windows of text are traced: balanced over the data sets, the same for the same seed.

Owns the choice alone: whole documents in, token windows out. Knows no model, writes nothing.

Documents are taken in the order of a hash of their text keyed by the seed, so neither the order nor
the duplicates of a corpus matter. Each document gives one window first, then every document a
second one, until there are enough: as many documents as possible are seen. Windows never overlap.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from .corpora.corpus import Corpus
from .corpora.split import document_hash, split_of
from .errors import CorpusError
from .trace.columns import SPLITS

log = logging.getLogger("outrider.collect")

MIN_TOKENS = 16
_TOKENIZER_BATCH = 64
_PIECE_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Samples:
    """The chosen windows of one data set: N samples, W tokens at most, padded on the right with
    `pad`.

    `token_ids` int32 [N, W], `lengths` int32 [N], `document_id` uint64 [N], `split` uint8 [N]
    (index in SPLITS), `offset` uint32 [N]: the character of its document at which the window
    begins.
    """

    name: str
    source: str
    token_ids: np.ndarray
    lengths: np.ndarray
    document_id: np.ndarray
    split: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.lengths.sum())

    @property
    def num_documents(self) -> int:
        """Documents the windows come from."""
        return len(np.unique(self.document_id))

    def part(self, start: int, end: int) -> Samples:
        """Samples `start` to `end - 1`; views."""
        return replace(
            self,
            token_ids=self.token_ids[start:end],
            lengths=self.lengths[start:end],
            document_id=self.document_id[start:end],
            split=self.split[start:end],
            offset=self.offset[start:end],
        )

    def digest(self) -> str:
        """xxh3_64 (hex) over everything chosen."""
        digest = xxhash.xxh3_64()
        for array in (self.token_ids, self.lengths, self.document_id, self.split, self.offset):
            digest.update(array.tobytes())
        return digest.hexdigest()


def choose_samples(
    corpora: Sequence[Corpus], tokenizer: Any, *, traces: int, context_tokens: int, seed: int
) -> list[Samples]:
    """`traces` windows spread over the corpora, as evenly as what they hold allows.

    What one corpus cannot give is asked of the others, and logged. Blocks while text is read and
    tokenized. CorpusError where all of them together hold too little, or one holds nothing.
    """
    if traces < len(corpora):
        raise CorpusError(
            f"{traces} traces over {len(corpora)} data sets; ask for one each at least"
        )
    prefix = special_prefix(tokenizer)
    if not len(prefix) < context_tokens <= np.iinfo(np.uint16).max:
        raise CorpusError(
            f"{context_tokens} context tokens; accepted are {len(prefix) + 1} to "
            f"{np.iinfo(np.uint16).max}"
        )
    wanted = [traces // len(corpora) + (i < traces % len(corpora)) for i in range(len(corpora))]
    limited: dict[int, int] = {}
    chosen: list[list[_Window]] = [[] for _ in corpora]
    while True:
        for i, corpus in enumerate(corpora):
            if i in limited or len(chosen[i]) == wanted[i]:
                continue
            chosen[i] = _windows(
                corpus, tokenizer, count=wanted[i], body=context_tokens - len(prefix), seed=seed
            )
            if not chosen[i]:
                raise CorpusError(
                    f"data set {corpus.name!r} ({corpus.source}) has no document of at least "
                    f"{min(MIN_TOKENS, context_tokens - len(prefix))} tokens"
                )
            if len(chosen[i]) < wanted[i]:
                limited[i] = len(chosen[i])
                log.warning(
                    "%s holds %d windows of %d tokens, not %d; the rest is asked of the others",
                    corpus.name,
                    len(chosen[i]),
                    context_tokens,
                    wanted[i],
                )
        missing = traces - sum(len(windows) for windows in chosen)
        if not missing:
            break
        open_ones = [i for i in range(len(corpora)) if i not in limited]
        if not open_ones:
            raise CorpusError(
                f"{', '.join(corpus.name for corpus in corpora)} hold {traces - missing} windows "
                "of "
                f"{context_tokens} tokens, {traces} traces were asked for; ask for fewer or "
                "shorter ones"
            )
        for place, i in enumerate(open_ones):
            wanted[i] += missing // len(open_ones) + (place < missing % len(open_ones))
    pad = _pad_id(tokenizer)
    return [
        _samples(corpus, windows, prefix=prefix, context_tokens=context_tokens, pad=pad)
        for corpus, windows in zip(corpora, chosen, strict=True)
    ]


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a beginning-of-text token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    for start in range(len(special) - len(plain), -1, -1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    return []


@dataclass(frozen=True, slots=True)
class _Window:
    document: _Document
    offset: int
    token_ids: np.ndarray


@dataclass(slots=True, eq=False)
class _Document:
    """A document whose windows are found piece by piece, in the seed's order, as they are
    needed.
    """

    document_id: int
    text: str
    pieces: list[tuple[int, int]]
    windows: list[_Window] = field(default_factory=list)


def _windows(corpus: Corpus, tokenizer: Any, *, count: int, body: int, seed: int) -> list[_Window]:
    """Up to `count` windows of at most `body` tokens; fewer only where the corpus holds no more."""
    capacity = count + count // 4 + 64
    while True:
        documents, exhausted = _first_documents(
            corpus.documents(), capacity, seed=seed, piece=_PIECE_CHARACTERS * body
        )
        windows = _turn(documents, 0, tokenizer, count=count, body=body, seed=seed)
        if len(windows) == count or exhausted:
            break
        capacity *= 2
    turn = 1
    while len(windows) < count:
        more = _turn(documents, turn, tokenizer, count=count - len(windows), body=body, seed=seed)
        if not more:
            break
        windows += more
        turn += 1
    return windows


def _turn(
    documents: Sequence[_Document], turn: int, tokenizer: Any, *, count: int, body: int, seed: int
) -> list[_Window]:
    """The window number `turn` of the first `count` documents that have one."""
    windows: list[_Window] = []
    for first in range(0, len(documents), _TOKENIZER_BATCH):
        part = documents[first : first + _TOKENIZER_BATCH]
        while wanting := [d for d in part if len(d.windows) <= turn and d.pieces]:
            _tokenize_piece(wanting, tokenizer, body=body, seed=seed)
        windows += [document.windows[turn] for document in part if len(document.windows) > turn]
        if len(windows) >= count:
            return windows[:count]
    return windows


def _tokenize_piece(
    documents: Sequence[_Document], tokenizer: Any, *, body: int, seed: int
) -> None:
    """Tokenize the next piece of each document and add its windows."""
    spans = [document.pieces.pop() for document in documents]
    encoded = tokenizer(
        [document.text[slice(*span)] for document, span in zip(documents, spans, strict=True)],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for row, (document, span) in enumerate(zip(documents, spans, strict=True)):
        ids = np.asarray(encoded["input_ids"][row], dtype=np.int32)
        whole = span == (0, len(document.text))
        for start in _starts(len(ids), document.document_id, body=body, seed=seed, whole=whole):
            offset = span[0]
            if start and encoded.is_fast:
                offset += encoded.token_to_chars(row, start).start
            document.windows.append(_Window(document, offset, ids[start : start + body]))


def _first_documents(
    documents: Iterable[str], capacity: int, *, seed: int, piece: int
) -> tuple[list[_Document], bool]:
    """The `capacity` distinct documents that come first in the seed's order, and whether that is
    all.

    Memory holds no more than those, whatever the corpus.
    """
    heap: list[tuple[int, int, str]] = []
    held: set[int] = set()
    exhausted = True
    for text in documents:
        text = text.encode("utf-8", "replace").decode("utf-8") if not _is_plain(text) else text
        document_id = document_hash(text)
        if document_id in held or not text:
            continue
        key = -_keyed(document_id, seed)
        if len(heap) < capacity:
            heapq.heappush(heap, (key, document_id, text))
            held.add(document_id)
            continue
        exhausted = False
        if key > heap[0][0]:
            held.add(document_id)
            held.discard(heapq.heapreplace(heap, (key, document_id, text))[1])
    heap.sort(key=lambda entry: (-entry[0], entry[1]))
    first = [
        _Document(document_id, text, _pieces(text, document_id, size=piece, seed=seed))
        for _, document_id, text in heap
    ]
    return first, exhausted


def _pieces(text: str, document_id: int, *, size: int, seed: int) -> list[tuple[int, int]]:
    """The document cut before white space into spans of about `size` characters, the first one
    last.

    Long documents are tokenized only as far as windows are wanted of them; the seed says where.
    """
    spans, start = [], 0
    while start < len(text):
        end = start + size
        while end < len(text) and not text[end].isspace():
            end += 1
        end = end if end < len(text) else len(text)
        spans.append((start, end))
        start = end
    spans.sort(key=lambda span: _keyed(document_id ^ (span[0] + 1), seed), reverse=True)
    return spans


def _starts(
    num_tokens: int, document_id: int, *, body: int, seed: int, whole: bool
) -> Sequence[int]:
    """Where a piece's windows begin, in the seed's order; a short one only of a short document."""
    if num_tokens < body:
        return (0,) if whole and num_tokens >= min(MIN_TOKENS, body) else ()
    starts = range(0, num_tokens - body + 1, body)
    return sorted(starts, key=lambda start: _keyed(document_id ^ (start + 1), seed))


def _samples(
    corpus: Corpus, windows: Sequence[_Window], *, prefix: list[int], context_tokens: int, pad: int
) -> Samples:
    token_ids = np.full((len(windows), context_tokens), pad, dtype=np.int32)
    token_ids[:, : len(prefix)] = prefix
    for row, window in zip(token_ids, windows, strict=True):
        row[len(prefix) : len(prefix) + len(window.token_ids)] = window.token_ids
    return Samples(
        name=corpus.name,
        source=corpus.source,
        token_ids=token_ids,
        lengths=np.array([len(prefix) + len(w.token_ids) for w in windows], dtype=np.int32),
        document_id=np.array([w.document.document_id for w in windows], dtype=np.uint64),
        split=np.array([SPLITS.index(split_of(w.document.text)) for w in windows], dtype=np.uint8),
        offset=np.array([window.offset for window in windows], dtype=np.uint32),
    )


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def _keyed(value: int, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(value.to_bytes(8, "little"), seed=seed & 0xFFFFFFFFFFFFFFFF)


def _is_plain(text: str) -> bool:
    """Whether the text can be tokenized as it is; a lone surrogate (from JSON) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
