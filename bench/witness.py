"""What the engine's token did in time: when it waited for experts, and what was read meanwhile.

Looks on from outside: the transfer engine's `submit` and its reader are wrapped while a run is
watched, so an engine that nobody watches pays nothing. Knows no arms and no statistics.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..collect.schema import ExpertKey
from ..runtime.experts.cache import Kind, Slot
from ..runtime.experts.transfer import Transfer
from .throttle import disk_of
from .timeline import LINK, PROCESSOR, Span, line_of

COMPUTING, WAITING = "computing", "waiting"


class Witness:
    """Spans of reads and waits so far; any thread may add to them."""

    def __init__(self) -> None:
        self.reads: list[Span] = []
        self.waits: list[Span] = []
        self.tokens: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    def read(self, what: str, began_s: float) -> None:
        """A read of an expert's pieces ends now."""
        with self._lock:
            self.reads.append((LINK, what, began_s, time.perf_counter()))

    @contextmanager
    def token(self) -> Iterator[None]:
        """The block is one token."""
        began = time.perf_counter()
        yield
        self.tokens.append((began, time.perf_counter()))

    def median_token(self) -> tuple[float, float]:
        """The token that took as long as most did: when it began and ended."""
        return sorted(self.tokens, key=lambda one: one[1] - one[0])[len(self.tokens) // 2]

    def timeline(self, arm: str) -> dict[str, Any]:
        """The median token: `events` with lane, name, start and seconds, as of a replay's token."""
        token = self.median_token()
        waits = [one for one in self.waits if token[0] <= one[2] and one[3] <= token[1]]
        spans = [*waits, *_between(waits, *token), *self.reads]
        return line_of(arm, spans, token=token, is_simulated=False)


@contextmanager
def watched(transfers: Any) -> Iterator[Witness]:
    """Watch a ThreadTransfer, or the one that a tiered engine reads from disk with."""
    witness = Witness()
    threads: Any = disk_of(transfers)
    submit, disk_submit, reader = transfers.submit, threads.submit, threads.reader
    named: dict[int, str] = {}

    def noting(submit: Callable[..., Any]) -> Callable[[ExpertKey, Slot, Kind], Transfer]:
        def note(key: ExpertKey, slot: Slot, kind: Kind) -> Transfer:
            copy = submit(key, slot, kind)
            plan = getattr(copy, "plan", None)
            if plan is not None:
                named[id(plan)] = f"{kind.value} {key.layer_idx}/{key.expert_idx}"
            copy.wait = _timed_wait(copy, witness)
            return copy

        return note

    threads.submit = noting(disk_submit)
    if threads is not transfers:
        transfers.submit = noting(submit)
    threads.reader = _WatchedReader(reader, witness, named)
    try:
        yield witness
    finally:
        threads.reader = reader
        del threads.submit
        if threads is not transfers:
            del transfers.submit


class _WatchedReader:
    """A FileReader whose runs of pieces are written down."""

    def __init__(self, reader: Any, witness: Witness, named: dict[int, str]) -> None:
        self._reader = reader
        self._witness = witness
        self._named = named

    def read_run(self, plan: Any, run: range, **given: Any) -> int:
        began = time.perf_counter()
        try:
            return self._reader.read_run(plan, run, **given)  # type: ignore[no-any-return]
        finally:
            self._witness.read(self._named.get(id(plan), "read"), began)

    def close(self) -> None:
        self._reader.close()


def _timed_wait(copy: Any, witness: Witness) -> Callable[[], None]:
    wait = copy.wait

    def timed() -> None:
        if copy.done():
            wait()
            return
        began = time.perf_counter()
        try:
            wait()
        finally:
            key = copy.key
            what = f"{WAITING} for {key.layer_idx}/{key.expert_idx}"
            witness.waits.append((PROCESSOR, what, began, time.perf_counter()))

    return timed


def _between(waits: list[Span], began: float, ended: float) -> list[Span]:
    """What the processor did while it did not wait."""
    found: list[Span] = []
    at = began
    for _, _, first, last in sorted(waits, key=lambda one: one[2]):
        if first > at:
            found.append((PROCESSOR, COMPUTING, at, first))
        at = max(at, last)
    if ended > at:
        found.append((PROCESSOR, COMPUTING, at, ended))
    return found
