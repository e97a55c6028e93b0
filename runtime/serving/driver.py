"""The engine's own thread: takes requests, runs passes, and posts what is to be sent.

Knows no socket. Everything it is told waits in an inbox that holds one entry a request, and
everything it says in an outbox that credit bounds.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import OutriderError
from .backend import Backend
from .clock import AwakeClock
from .intake import Intake
from .messages import Chunk, Done, Error, Generate
from .metrics import Snapshot, Timings
from .work import Ending, Event, Key, Outcome, Work, error_of

logger = logging.getLogger(__name__)

# A pass that could run nothing, since what waits needs memory that others hold, is tried again.
_RETRY_S = 0.05


@dataclass(slots=True)
class _Inbox:
    opened: list[Work] = field(default_factory=list)
    encoded: list[tuple[Key, list[int] | Error]] = field(default_factory=list)
    grants: dict[Key, int] = field(default_factory=dict)
    endings: dict[Key, Ending] = field(default_factory=dict)
    wants_snapshot: bool = False
    is_stopping: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.opened
            or self.encoded
            or self.grants
            or self.endings
            or self.wants_snapshot
            or self.is_stopping
        )


class Driver:
    """Runs a backend. Its methods may be called from any one other thread; none of them blocks.

    `notify` is called, on the engine's thread, when `take` has something to give.
    `error` is what the thread died of.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        notify: Callable[[], None],
        clock: AwakeClock,
        slow_consumer_s: float,
    ) -> None:
        self.is_busy = False
        self.error: BaseException | None = None
        self._backend = backend
        self._notify = notify
        self._clock = clock
        self._slow_consumer_s = slow_consumer_s
        self._num_turns = 0
        self._timings = Timings()
        self._inbox = _Inbox()
        self._condition = threading.Condition()
        self._is_stuck = False
        self._works: dict[Key, Work] = {}
        self._by_stream: dict[int, Work] = {}
        self._outbox: deque[Event | Snapshot] = deque()
        self._intake = Intake(backend, self._encoded)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Snapshot:
        """Begin; returns what has been counted, which is nothing yet."""
        first = self._snapshot()
        self._thread.start()
        return first

    @property
    def progress(self) -> object:
        """A value that changes while the engine gets on, within a pass too."""
        return self._num_turns, self._backend.progress()

    @property
    def num_failures(self) -> int:
        """Passes in a row that failed."""
        return self._backend.num_failures

    def submit(self, key: Key, request: Generate) -> None:
        """Serve a request; the caller sees to it that no other one with this key is open."""
        work = Work.of(key, request, time.monotonic())
        with self._condition:
            self._inbox.opened.append(work)
            self._condition.notify()
        self._intake.put(key, request)

    def grant(self, key: Key, num_chunks: int) -> None:
        """The client takes more chunks."""
        with self._condition:
            self._inbox.grants[key] = self._inbox.grants.get(key, 0) + num_chunks
            self._condition.notify()

    def end(self, key: Key, ending: Ending) -> None:
        """End a request between two passes, if it is still open; the first ending counts."""
        with self._condition:
            self._inbox.endings.setdefault(key, ending)
            self._condition.notify()

    def ask_snapshot(self) -> None:
        """Post a Snapshot after the pass that runs now."""
        with self._condition:
            self._inbox.wants_snapshot = True
            self._condition.notify()

    def take(self) -> list[Event | Snapshot]:
        """Everything posted since the last call, in order."""
        taken = []
        while self._outbox:
            taken.append(self._outbox.popleft())
        return taken

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the pass that runs now; False if it has not ended in time."""
        self._intake.close()
        with self._condition:
            self._inbox.is_stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _encoded(self, key: Key, result: list[int] | Error) -> None:
        with self._condition:
            self._inbox.encoded.append((key, result))
            self._condition.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass  # all is done in the condition
        except BaseException as error:
            logger.critical("the engine died", exc_info=error)
            self.error = error
        finally:
            self.is_busy = False
            self._notify()

    def _turn(self) -> bool:
        inbox = self._wait()
        if inbox.is_stopping:
            return False
        self.is_busy = True
        self._apply(inbox)
        self._expire()
        gained = self._backend.step() if self._backend.has_work else {}
        for stream, text in gained.items():
            work = self._by_stream.get(id(stream))
            if work is not None:
                self._advance(work, text)
        self._num_turns += 1
        if inbox.wants_snapshot:
            self._outbox.append(self._snapshot())
        self.is_busy = False
        if self._outbox:
            self._notify()
        self._is_stuck = self._backend.has_work and not gained
        return True

    def _wait(self) -> _Inbox:
        with self._condition:
            if not self._inbox and (self._is_stuck or not self._backend.has_work):
                self._condition.wait(self._patience())
            inbox, self._inbox = self._inbox, _Inbox()
            return inbox

    def _patience(self) -> float | None:
        """Seconds until something is due by itself; None if nothing is."""
        if self._is_stuck:
            return _RETRY_S
        if any(work.paused_at_s is not None for work in self._works.values()):
            return 0.25
        deadlines = [one.deadline_s for one in self._works.values() if one.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _apply(self, inbox: _Inbox) -> None:
        for work in inbox.opened:
            self._works[work.key] = work
        for key, result in inbox.encoded:
            if key in self._works:
                self._begin(self._works[key], result)
        for key, num_chunks in inbox.grants.items():
            if key in self._works:
                self._grant(self._works[key], num_chunks)
        for key, ending in inbox.endings.items():
            if key in self._works:
                self._cut(self._works[key], ending)

    def _begin(self, work: Work, result: list[int] | Error) -> None:
        if isinstance(result, Error):
            self._cut(work, Ending(result))
            return
        try:
            owner = work.key.client.hex()
            stream = self._backend.submit(work.request, result, owner=owner)
        except OutriderError as error:
            self._cut(work, Ending(error_of(error)))
            return
        except Exception as error:  # nothing has run yet, so nobody else is concerned
            logger.exception("a request could not be begun")
            self._cut(work, Ending(error_of(error)))
            return
        work.stream = stream
        self._by_stream[id(stream)] = work

    def _grant(self, work: Work, num_chunks: int) -> None:
        work.credit += num_chunks
        if work.paused_at_s is not None and work.stream is not None:
            work.paused_at_s = None
            self._backend.resume(work.stream)

    def _expire(self) -> None:
        now = time.monotonic()
        for work in list(self._works.values()):
            if work.deadline_s is not None and now >= work.deadline_s:
                message = f"the deadline of {work.request.deadline_ms} ms has passed"
                self._cut(work, Ending(Error(code="deadline_exceeded", message=message)))
            elif (
                work.paused_at_s is not None
                and self._clock.now_s - work.paused_at_s >= self._slow_consumer_s
            ):
                message = f"no credit was granted for {self._slow_consumer_s:g} s"
                self._cut(work, Ending(Error(code="slow_consumer", message=message)))

    def _advance(self, work: Work, text: str) -> None:
        stream = work.stream
        assert stream is not None
        now = time.monotonic()
        if work.first_s is None and stream.token_ids:
            work.first_s = now
            self._timings.time_to_first_token.add(now - work.received_s)
            self._timings.prompt_tokens += work.num_prompt_tokens
            self._timings.prompt_tokens_cached += work.num_cached_tokens
        elif stream.token_ids:
            self._timings.inter_token_latency.add(now - work.last_s)
        work.last_s = now
        self._timings.generation_tokens += work.num_tokens - work.num_counted
        work.num_counted = work.num_tokens
        work.text += text
        if stream.error is None and work.is_chunk_due():
            self._post(work, work.chunk(self._backend.token_text))
        reason = stream.finish_reason
        if stream.error is not None or reason == "error":
            self._close(work, error_of(stream.error), "error")
        elif reason in ("stop", "length"):
            self._close(work, work.done(reason), reason)
        elif reason is not None:
            self._close(work, work.done("cancelled"), "cancelled")
        elif work.credit <= 0:
            work.paused_at_s = self._clock.now_s
            self._backend.pause(stream)

    def _cut(self, work: Work, ending: Ending) -> None:
        if work.stream is not None:
            self._backend.cancel(work.stream)
        if ending.is_silent:
            self._close(work, None, "cancelled" if ending.error is None else "error")
        elif ending.error is not None:
            self._close(work, ending.error, "error")
        else:
            self._close(work, work.done("cancelled"), "cancelled")

    def _close(self, work: Work, message: Done | Error | None, outcome: Outcome) -> None:
        now = time.monotonic()
        self._timings.e2e_latency.add(now - work.received_s)
        del self._works[work.key]
        if work.stream is not None:
            del self._by_stream[id(work.stream)]
        self._outbox.append(Event(work.key, message, outcome, work.summary(now)))

    def _post(self, work: Work, message: Chunk) -> None:
        self._outbox.append(Event(work.key, message))

    def _snapshot(self) -> Snapshot:
        return self._timings.snapshot(
            num_running=self._backend.num_running, experts=self._backend.totals()
        )
