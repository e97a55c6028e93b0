"""Worker processes on a cluster that share one queue; one that dies is replaced.

Each keeps an object of its own, a loaded model for instance, and takes the next task when it is
free. Knows neither what tasks nor what results are.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import OutriderError
from .cluster import Cluster
from .queue import Job, TaskQueue

log = logging.getLogger("outrider.scaleout")

T = TypeVar("T")
R = TypeVar("R")

# A task that ends this many workers is given up; so is a worker that fails to start as often.
MAX_DEATHS = 3
_LOOK_S = 0.5
_ANSWER_S = 0.2


class WorkerError(OutriderError):
    """Workers cannot start, differ from each other, or died too often at one task."""


class RemoteWorker:
    """What runs in a worker's process: the object that `home` (`module:Class`) makes, kept alive.

    Such a class has `facts`, `run(common, task)`, and `progress()`, which is called from another
    thread while `run` runs.
    """

    def __init__(self, home: str, arguments: tuple[Any, ...]) -> None:
        self._home = home
        self._arguments = arguments

    def facts(self) -> Any:
        """What the worker says of itself, once it is ready.

        It is made here: of an error in a constructor Ray would hand on the text alone.
        """
        module, _, name = self._home.partition(":")
        self._worker = getattr(importlib.import_module(module), name)(*self._arguments)
        return self._worker.facts

    def run(self, common: Any, task: Any) -> Any:
        """One task's result."""
        return self._worker.run(common, task)

    def progress(self) -> int:
        """How far the running task is."""
        return self._worker.progress()


@dataclass(slots=True)
class _Running(Generic[T]):
    actor: Any
    job: Job[T]
    asked: Any = None


class WorkerPool(Generic[T, R]):
    """Workers on a cluster; a context manager that ends them. One thread only.

    `arguments` go to the constructor of the class at `home`; `cpus` and `gpus` are what each worker
    takes of the cluster.
    """

    def __init__(
        self,
        cluster: Cluster,
        home: str,
        arguments: tuple[Any, ...],
        *,
        num_workers: int,
        cpus: int = 1,
        gpus: int = 0,
    ) -> None:
        self._ray = cluster.ray
        self._arguments = (home, arguments)
        self._num_workers = num_workers
        cluster.ray.method(concurrency_group="told")(RemoteWorker.progress)
        self._remote = cluster.ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"told": 1},
        )(RemoteWorker)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, _Running[T]] = {}
        self._first_facts: Any = None
        self._failed_starts = 0

    def __enter__(self) -> WorkerPool[T, R]:
        for _ in range(self._num_workers):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        busy = [one.actor for one in self._running.values()]
        for actor in (*self._idle, *self._starting.values(), *busy):
            self._ray.kill(actor)

    def facts(self, check: Callable[[Any, Any], None]) -> Any:
        """Wait for the first ready worker and hand out its facts.

        `check` is called with these and each later worker's, and raises where the two may not work
        together. An error that a worker starts with is raised here.
        """
        self._check = check
        while self._first_facts is None:
            self._ended(lambda task, done: None)
        return self._first_facts

    def results(
        self,
        tasks: Iterable[T],
        common: Callable[[], Any],
        *,
        on_death: Callable[[T, BaseException], None],
        told: Callable[[T, int], None] = lambda task, done: None,
    ) -> Iterator[tuple[T, R]]:
        """Each task with its result, once, in the order in which they are done; after `facts`.

        `common` gives what goes with every task; `on_death` hears which task ended a worker, and
        why. There is one task and at most one result a worker, whatever the caller's pace. What a
        task itself raises is raised here; WorkerError where one task ends MAX_DEATHS workers.
        """
        queue = TaskQueue(tasks)
        while True:
            self._submit(queue, common)
            if queue.is_over:
                return
            for reference, one in self._ended(told):
                job = one.job
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    raise _cause(error) from None
                except self._ray.exceptions.RayError as error:
                    queue.die(job)
                    if job.deaths == MAX_DEATHS and not job.is_done:
                        raise WorkerError(
                            f"the same task ended {MAX_DEATHS} workers, last: {_reason(error)}"
                        ) from None
                    on_death(job.task, error)
                    self._start()
                    continue
                self._idle.append(one.actor)
                if queue.finish(job):
                    # The worker goes on while the caller is busy with its result.
                    self._submit(queue, common)
                    yield job.task, result

    def _submit(self, queue: TaskQueue[T], common: Callable[[], Any]) -> None:
        while self._idle:
            job = queue.take()
            if job is None:
                return
            actor = self._idle.pop()
            self._running[actor.run.remote(common(), job.task)] = _Running(actor, job)

    def _ended(self, told: Callable[[T, int], None]) -> list[tuple[Any, _Running[T]]]:
        """Wait a little; new workers become idle, and what ended is handed out."""
        waiting = [*self._running, *self._starting]
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=_LOOK_S)
        if not ready:
            self._ask(told)
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
        return [(one, self._running.pop(one)) for one in ready if one in self._running]

    def _ask(self, told: Callable[[T, int], None]) -> None:
        """Ask each worker how far it is; one that does not answer is not asked again."""
        for one in self._running.values():
            one.asked = one.asked or one.actor.progress.remote()
        asked = {one.asked: one for one in self._running.values()}
        if not asked:
            return
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        for reference in answered:
            one = asked[reference]
            one.asked = None
            try:
                done = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                continue  # its `run` says so too
            if not one.job.is_done:
                told(one.job.task, done)

    def _start(self) -> None:
        actor = self._remote.remote(*self._arguments)
        self._starting[actor.facts.remote()] = actor

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            facts = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts == MAX_DEATHS:
                raise WorkerError(f"workers cannot start: {_reason(error)}") from None
            log.warning("a worker ended while it started and is replaced: %s", _reason(error))
            self._start()
            return
        self._failed_starts = 0
        if self._first_facts is None:
            self._first_facts = facts
        self._check(self._first_facts, facts)
        self._idle.append(actor)


def _cause(error: Any) -> BaseException:
    """What the worker's own code raised, as it raised it."""
    return error.cause if isinstance(error.cause, Exception) else WorkerError(_reason(error))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
