"""Keys and values of prompts, kept for requests that begin with the same tokens.

Which ones are kept, found and let go: no arithmetic, no tensors of its own. Only for models whose
prompt rows have the same bits however the prompt is cut (`models.native_decoder`): what was
generated is never reused, since decoded tokens are computed another way than a prompt's.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

BLOCK_TOKENS = 32
"""Prefixes are compared and reused in whole blocks of so many tokens."""


class Kv(Protocol):
    """Keys and values of one sequence."""

    @property
    def capacity(self) -> int: ...
    def copied(self, num_tokens: int) -> Any: ...


class Prefixed(Protocol):
    """What is needed of a sequence: its prompt, and how much of it has been computed."""

    prompt_token_ids: list[int]
    num_computed: int
    num_cached_tokens: int
    kv: Any


@dataclass(slots=True, eq=False)
class _Block:
    """A node of the tree of prefixes: those who have it are in `holders`, the latest last."""

    serial: int
    holders: "dict[_Entry, None]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Entry:
    """`num_tokens` is the memory it holds by itself: none while its sequence is under way."""

    kv: Kv
    path: list[tuple[int, tuple[int, ...]]]
    num_tokens: int = 0


class PrefixCache:
    """Prompts of sequences that run, and of those that ended, least recently used out first.

    Those that ended hold at most `max_tokens` of KV memory. One thread, the scheduler's.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._serials = count(1)
        self._blocks: dict[tuple[int, tuple[int, ...]], _Block] = {}
        self._running: dict[int, _Entry] = {}
        self._kept: OrderedDict[_Entry, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def make_room(self, num_tokens: int, sequence: Prefixed) -> None:
        """Hold at most `num_tokens`; what `sequence` would reuse goes last."""
        if self.num_tokens > num_tokens:
            entry, _ = self._find(sequence)
            if entry in self._kept:
                self._kept.move_to_end(entry)
            self._shrink(num_tokens)

    def admit(self, sequence: Prefixed) -> None:
        """A sequence has its KV memory: let it begin behind the longest prefix there is.

        At least one token of its prompt is left to run, for its logits.
        """
        if sequence.num_computed:
            return
        entry, num_tokens = self._find(sequence)
        if entry is None:
            return
        if entry in self._kept:
            self._kept.move_to_end(entry)
        sequence.kv = entry.kv.copied(num_tokens)
        sequence.num_computed = sequence.num_cached_tokens = num_tokens

    def offer(self, sequence: Prefixed) -> None:
        """A running sequence's prompt is computed: others may begin with it from now on."""
        if id(sequence) not in self._running:
            entry = self._insert(sequence)
            if entry is not None:
                self._running[id(sequence)] = entry

    def leave(self, sequence: Prefixed) -> None:
        """A sequence has ended and its KV memory is free: keep it while there is room."""
        entry = self._running.pop(id(sequence), None) or self._insert(sequence)
        if entry is None:
            return
        size = sequence.kv.capacity
        covering = self._blocks[entry.path[-1]].holders
        if size > self.max_tokens or any(other in self._kept for other in covering):
            self._remove(entry)
            return
        self._shrink(self.max_tokens - size)
        # What it continues is of no use beside it: the earlier turns of a chat.
        for key in entry.path[:-1]:
            for other in [one for one in self._blocks[key].holders if one in self._kept]:
                if other.path[-1] == key:
                    self._remove(other)
        entry.num_tokens = size
        self.num_tokens += size
        self._kept[entry] = None

    def _find(self, sequence: Prefixed) -> tuple[_Entry | None, int]:
        found, num_tokens, parent = None, 0, 0
        token_ids = sequence.prompt_token_ids
        for end in range(BLOCK_TOKENS, len(token_ids), BLOCK_TOKENS):
            block = self._blocks.get((parent, tuple(token_ids[end - BLOCK_TOKENS : end])))
            if block is None:
                break
            found, num_tokens, parent = next(reversed(block.holders)), end, block.serial
        return found, num_tokens

    def _insert(self, sequence: Prefixed) -> _Entry | None:
        token_ids = sequence.prompt_token_ids
        entry, parent = _Entry(sequence.kv, []), 0
        num_computed = min(sequence.num_computed, len(token_ids))
        for end in range(BLOCK_TOKENS, num_computed + 1, BLOCK_TOKENS):
            key = (parent, tuple(token_ids[end - BLOCK_TOKENS : end]))
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block(next(self._serials))
            block.holders[entry] = None
            entry.path.append(key)
            parent = block.serial
        return entry if entry.path else None

    def _remove(self, entry: _Entry) -> None:
        for key in entry.path:
            holders = self._blocks[key].holders
            del holders[entry]
            if not holders:
                del self._blocks[key]
        if entry in self._kept:
            del self._kept[entry]
            self.num_tokens -= entry.num_tokens

    def _shrink(self, num_tokens: int) -> None:
        while self.num_tokens > num_tokens:
            self._remove(next(iter(self._kept)))

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        entries = [*self._kept, *self._running.values()]
        held = {(id(entry), key) for entry in entries for key in entry.path}
        found = {(id(entry), key) for key, block in self._blocks.items() for entry in block.holders}
        assert held == found, "the tree holds what the entries say"
        assert all(block.holders for block in self._blocks.values()), "no block without holders"
        assert self.num_tokens == sum(entry.num_tokens for entry in self._kept), "tokens add up"
        assert self.num_tokens <= max(0, self.max_tokens), "no more than allowed"
