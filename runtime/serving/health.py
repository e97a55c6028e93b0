"""Whether a server does its work: the state it tells, and when a silent engine counts as dead.

Knows no socket and no engine; it is shown progress and counts awake seconds.
"""

from dataclasses import dataclass

from .clock import AwakeClock
from .messages import ServerState

# Passes in a row that fail before the server says that it cannot serve, and for how long it says
# so: the next request may find the disk mended.
MAX_FAILURES = 3
_FAILING_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Awake seconds without progress: until the server is not ready, and until it gives up."""

    stalled_s: float = 10.0
    dead_s: float = 300.0


class Health:
    """One thread; `look` is to be called a few times a second."""

    def __init__(self, patience: Patience, *, clock: AwakeClock) -> None:
        self.is_draining = False
        self.is_dead = False
        self._patience = patience
        self._clock = clock
        self._progress: object = None
        self._progress_s = clock.now_s
        self._failing_until_s = 0.0

    @property
    def silent_s(self) -> float:
        """Awake seconds since the engine got on, or had nothing to do."""
        return self._clock.now_s - self._progress_s

    @property
    def is_hanging(self) -> bool:
        """Whether the engine is to be given up."""
        return self.silent_s >= self._patience.dead_s

    @property
    def state(self) -> ServerState:
        """What clients are told; only `ready` is ready."""
        if self.is_dead:
            return "dead"
        if self.is_draining:
            return "draining"
        if self.silent_s >= self._patience.stalled_s:
            return "stalled"
        return "failing" if self._clock.now_s < self._failing_until_s else "ready"

    def look(self, progress: object, *, is_busy: bool, num_failures: int) -> None:
        """Take note of how far the engine has come."""
        if not is_busy or progress != self._progress:
            self._progress, self._progress_s = progress, self._clock.now_s
        if num_failures >= MAX_FAILURES:
            self._failing_until_s = self._clock.now_s + _FAILING_S
        elif num_failures == 0:
            self._failing_until_s = 0.0
