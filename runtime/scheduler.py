"""Which sequences run in the next pass, and how many tokens of each. Integers and lists only."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence."""

    @property
    def num_pending(self) -> int: ...
    @property
    def is_prefill(self) -> bool: ...
    @property
    def is_finished(self) -> bool: ...


S = TypeVar("S", bound=Schedulable)


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


class Scheduler(Generic[S]):
    """First come, first served; running streams first, then prompts in pieces.

    A pass holds at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences, so that a
    long prompt delays running streams by one piece at a time.
    """

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"{max_num_batched_tokens} tokens a pass for {max_num_seqs} sequences: at least "
                "one sequence is needed, and a token for each"
            )
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[S] = deque()
        self._running: list[S] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that have not run yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._running)

    def add(self, sequence: S) -> None:
        """Queue a sequence behind the others."""
        self._waiting.append(sequence)

    def sequences(self) -> Iterable[S]:
        """All that are not finished, running ones first."""
        return [*self._running, *self._waiting]

    def forget_finished(self) -> None:
        """Hold on to nothing that has finished, running or still waiting."""
        self._running = [one for one in self._running if not one.is_finished]
        self._waiting = deque(one for one in self._waiting if not one.is_finished)

    def schedule(self) -> ScheduledBatch[S]:
        """Plan the next pass and forget what has finished."""
        self.forget_finished()
        while self._waiting and len(self._running) < self._max_num_seqs:
            self._running.append(self._waiting.popleft())
        room = self._max_num_batched_tokens
        spans: list[ScheduledSpan[S]] = []
        start = 0
        for sequence in sorted(self._running, key=lambda one: one.is_prefill):
            num_tokens = min(sequence.num_pending, room - start)
            if num_tokens < 1:
                break
            is_last = num_tokens == sequence.num_pending
            spans.append(ScheduledSpan(sequence, start, start + num_tokens, is_last))
            start += num_tokens
        return ScheduledBatch(tuple(spans))
