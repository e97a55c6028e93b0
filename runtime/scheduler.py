"""Which sequences run in the next pass, and how many tokens of each. Integers and lists only."""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence."""

    @property
    def num_pending(self) -> int: ...
    @property
    def is_prefill(self) -> bool: ...
    @property
    def is_finished(self) -> bool: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a pass and of what is under way; ValueError if somebody could starve.

    `max_prefill_tokens` bounds the prompt tokens that run beside streams that decode, so that a
    long prompt delays them by one piece at a time. A rest of at most `min_piece_tokens` runs with
    the piece before it. `max_kv_tokens` bounds the tokens that all admitted sequences may come to
    hold in the KV cache; None is no bound. `prefix_share` of it at most may hold prompts of ended
    requests, for others that begin alike; it never keeps a request waiting.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    max_prefill_tokens: int = 512
    min_piece_tokens: int = 0
    max_kv_tokens: int | None = None
    prefix_share: float = 0.0

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"{self.max_num_batched_tokens} tokens a pass for {self.max_num_seqs} sequences: "
                "at least one sequence is needed, and a token for each"
            )
        if self.max_prefill_tokens < 1 or self.min_piece_tokens < 0:
            raise ValueError(
                f"prompt pieces of {self.max_prefill_tokens} tokens with rests of "
                f"{self.min_piece_tokens}: at least 1 and 0 are needed"
            )


@dataclass(frozen=True, slots=True)
class ScheduledSpan(Generic[S]):
    """Rows [start, end) of the pass run the next tokens of `sequence`.

    `is_last` says that the sequence's newest token is among them, so that one is sampled after.
    """

    sequence: S
    start: int
    end: int
    is_last: bool

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ScheduledBatch(Generic[S]):
    """What to run now; empty if there is nothing to do."""

    spans: tuple[ScheduledSpan[S], ...]

    @property
    def num_tokens(self) -> int:
        return self.spans[-1].end if self.spans else 0


class Leftovers(Protocol):
    """KV memory that nobody has been promised, put to use; told who comes and goes."""

    @property
    def num_tokens(self) -> int: ...
    def make_room(self, num_tokens: int, sequence: Any) -> None:
        """Hold at most `num_tokens`, for `sequence` wants the others."""
        ...

    def admit(self, sequence: Any) -> None:
        """`sequence` has its KV memory from now on; called once, before its first pass."""
        ...

    def leave(self, sequence: Any) -> None:
        """`sequence` had KV memory and has ended."""
        ...


@dataclass(slots=True, eq=False)
class _Entry(Generic[S]):
    sequence: S
    owner: str
    num_kv_tokens: int
    is_admitted: bool = False


class Scheduler(Generic[S]):
    """Running streams first, then prompts in pieces; a place goes to the owner who has fewest.

    One owner's sequences are served first come, first served, and the room for prompts is dealt
    evenly among owners. Nobody is overtaken for want of KV memory: who is next waits until there is
    enough. A paused sequence keeps its KV memory but no place in the batch.
    """

    def __init__(self, limits: BatchLimits, *, leftovers: Leftovers | None = None) -> None:
        self.limits = limits
        self._leftovers = leftovers
        self._waiting: deque[_Entry[S]] = deque()
        self._running: list[_Entry[S]] = []
        self._paused: list[_Entry[S]] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no place in the batch and want one."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._running)

    @property
    def num_paused(self) -> int:
        """Sequences that are not to run until they are resumed."""
        return len(self._paused)

    @property
    def num_kv_tokens(self) -> int:
        """KV memory that admitted sequences may come to hold, in tokens."""
        entries = [*self._waiting, *self._running, *self._paused]
        return sum(entry.num_kv_tokens for entry in entries if entry.is_admitted)

    def add(self, sequence: S, *, owner: str = "", num_kv_tokens: int = 0) -> None:
        """Queue a sequence; `num_kv_tokens` is what it may hold in the KV cache at its longest.

        Raises ValueError if that is more than there will ever be.
        """
        limit = self.limits.max_kv_tokens
        if limit is not None and num_kv_tokens > limit:
            raise ValueError(f"{num_kv_tokens} tokens in a KV cache of {limit}")
        self._waiting.append(_Entry(sequence, owner, num_kv_tokens))

    def pause(self, sequence: S) -> None:
        """Run nothing of the sequence until `resume`."""
        for entries in (self._running, self._waiting):
            for entry in entries:
                if entry.sequence is sequence:
                    entries.remove(entry)
                    self._paused.append(entry)
                    return

    def resume(self, sequence: S) -> None:
        """The sequence may run again: it is the next to be given a place."""
        for entry in self._paused:
            if entry.sequence is sequence:
                self._paused.remove(entry)
                self._waiting.appendleft(entry)
                return

    def sequences(self) -> Iterable[S]:
        """All that are not finished, running ones first."""
        return [entry.sequence for entry in (*self._running, *self._paused, *self._waiting)]

    def forget_finished(self) -> None:
        """Hold on to nothing that has finished, wherever it stands."""
        ended = [
            entry
            for entry in (*self._running, *self._paused, *self._waiting)
            if entry.sequence.is_finished
        ]
        if not ended:
            return
        self._running = [one for one in self._running if not one.sequence.is_finished]
        self._paused = [one for one in self._paused if not one.sequence.is_finished]
        self._waiting = deque(one for one in self._waiting if not one.sequence.is_finished)
        if self._leftovers is not None:
            for entry in ended:
                if entry.is_admitted:
                    self._leftovers.leave(entry.sequence)

    def schedule(self) -> ScheduledBatch[S]:
        """Plan the next pass and forget what has finished."""
        self.forget_finished()
        self._admit()
        room = self.limits.max_num_batched_tokens
        decoding = [entry for entry in self._running if not entry.sequence.is_prefill]
        prompts = [entry for entry in self._running if entry.sequence.is_prefill]
        spans: list[ScheduledSpan[S]] = []
        start = 0
        for entry, num_tokens in [
            *((entry, entry.sequence.num_pending) for entry in decoding),
            *self._pieces(prompts, room - len(decoding), beside_streams=bool(decoding)),
        ]:
            is_last = num_tokens == entry.sequence.num_pending
            spans.append(ScheduledSpan(entry.sequence, start, start + num_tokens, is_last))
            start += num_tokens
        return ScheduledBatch(tuple(spans))

    def _admit(self) -> None:
        limit = self.limits.max_kv_tokens
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            entry = self._next()
            held = 0 if entry.is_admitted else entry.num_kv_tokens
            left = math.inf if limit is None else limit - self.num_kv_tokens - held
            if left < 0:
                return
            if self._leftovers is not None and not entry.is_admitted:
                if self._leftovers.num_tokens > left:
                    self._leftovers.make_room(int(left), entry.sequence)
                self._leftovers.admit(entry.sequence)
            entry.is_admitted = True
            self._waiting.remove(entry)
            self._running.append(entry)

    def _next(self) -> _Entry[S]:
        # What was admitted before holds memory that others wait for, so it goes first.
        places = Counter(entry.owner for entry in self._running)
        return min(self._waiting, key=lambda entry: (not entry.is_admitted, places[entry.owner]))

    def _pieces(
        self, prompts: list[_Entry[S]], room: int, *, beside_streams: bool
    ) -> Iterable[tuple[_Entry[S], int]]:
        if not prompts:
            return
        left = min(room, self.limits.max_prefill_tokens) if beside_streams else room
        spare = room - left
        wanted = Counter[str]()
        for entry in prompts:
            wanted[entry.owner] += entry.sequence.num_pending
        share = dict(zip(wanted, deal(list(wanted.values()), left), strict=True))
        for entry in prompts:
            pending = entry.sequence.num_pending
            num_tokens = min(pending, share[entry.owner])
            rest = pending - num_tokens
            if num_tokens and rest <= min(self.limits.min_piece_tokens, spare):
                num_tokens, spare = pending, spare - rest
            share[entry.owner] -= min(num_tokens, share[entry.owner])
            if num_tokens:
                yield entry, num_tokens


def deal(wanted: list[int], room: int) -> list[int]:
    """As even shares of `room` as can be, nobody more than wanted; what is over goes to the first.

    The sum is min(room, sum(wanted)).
    """
    shares = [0] * len(wanted)
    while room > 0:
        open_ones = [i for i, want in enumerate(wanted) if shares[i] < want]
        if not open_ones:
            break
        each = max(1, room // len(open_ones))
        for i in open_ones:
            given = min(each, wanted[i] - shares[i], room)
            shares[i] += given
            room -= given
    return shares


def saturating_tokens(num_experts: int, top_k: int, *, share: float = 0.95) -> int:
    """Tokens of a pass that use `share` of a layer's experts if they chose them at random.

    A pass's cost in experts is the union over its tokens, so a piece of a prompt above this reads
    about all of them, however long it is, and a rest below it is not worth a pass of its own.
    """
    if top_k >= num_experts:
        return 1
    return math.ceil(math.log(1.0 - share) / math.log(1.0 - top_k / num_experts))
