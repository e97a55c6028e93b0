"""The standard library's Executor over a Ray cluster, for tasks that keep nothing between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from .cluster import Cluster

# A task whose worker died is run again so often, by Ray itself.
MAX_RETRIES = 3


class ClusterExecutor(Executor):
    """`submit` runs an importable function on any node; one CPU and `gpus` cards a task.

    Its future raises what the function raised, or Ray's own error once MAX_RETRIES workers died.
    """

    def __init__(self, cluster: Cluster, *, gpus: int = 0) -> None:
        self._ray = cluster.ray
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": MAX_RETRIES}
        self._task = cluster.ray.remote(**options)(_call)
        self._references: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Begin fn(*args, **kwargs) where there is room; does not block."""
        reference = self._task.remote(fn, args, kwargs)
        self._references.append(reference)
        return reference.future()

    def __exit__(self, *error: object) -> None:
        self.shutdown(cancel_futures=error[0] is not None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """With `cancel_futures`, end what runs or waits; else wait for it if `wait`."""
        if cancel_futures:
            for reference in self._references:
                self._ray.cancel(reference)
        elif wait and self._references:
            self._ray.wait(self._references, num_returns=len(self._references))
        self._references.clear()


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)
