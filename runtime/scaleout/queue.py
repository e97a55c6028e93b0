"""One queue of tasks for many workers: what to do next, what to do again, what is late. No Ray.

A task whose worker died comes back first; once none is left, a late one is handed out a second
time and the first result counts (the backup tasks of MapReduce, Dean and Ghemawat 2004).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# An unfinished task is late after this many times the median of the finished ones.
LATE_FACTOR = 3.0
LATE_AT_LEAST_S = 5.0


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """One task and how often it was begun, ended a worker, and was done."""

    task: T
    deaths: int = 0
    is_done: bool = False
    began: list[float] = field(default_factory=list)


class TaskQueue(Generic[T]):
    """Tasks are drawn from `tasks` as they are taken, so none is held before its time."""

    def __init__(self, tasks: Iterable[T], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks = iter(tasks)
        self._is_drawn = False
        self._again: deque[Job[T]] = deque()
        self._open: list[Job[T]] = []
        self._seconds: list[float] = []
        self._clock = clock

    @property
    def is_over(self) -> bool:
        """Whether every task is done."""
        return self._is_drawn and not self._open

    def take(self) -> Job[T] | None:
        """What a free worker begins now; None if that is nothing, for the moment or for good."""
        job = self._again.popleft() if self._again else self._next() or self._late()
        if job is not None:
            job.began.append(self._clock())
        return job

    def finish(self, job: Job[T]) -> bool:
        """A worker has done the job. False if another one had before: the result is not needed."""
        if job.is_done:
            return False
        job.is_done = True
        self._open.remove(job)
        self._seconds.append(self._clock() - job.began[0])
        return True

    def die(self, job: Job[T]) -> None:
        """The job's worker is gone; somebody has to do it again unless somebody did."""
        job.deaths += 1
        job.began.pop()
        if not job.is_done and not job.began:
            self._again.append(job)

    def _next(self) -> Job[T] | None:
        for task in self._tasks:
            job = Job(task)
            self._open.append(job)
            return job
        self._is_drawn = True
        return None

    def _late(self) -> Job[T] | None:
        if not self._seconds:
            return None
        limit = max(LATE_AT_LEAST_S, LATE_FACTOR * statistics.median(self._seconds))
        now = self._clock()
        late = [job for job in self._open if len(job.began) == 1 and now - job.began[0] > limit]
        return min(late, key=lambda job: job.began[0], default=None)
