"""An arm in a process of its own, so that its memory is its own and another's is not measured.

The parent's side is `WorkerArm`; `python -m outrider.bench.worker` is the child's. They exchange
one JSON line a call over the child's standard streams; a child whose parent goes away ends.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from ..runtime import errors
from ..runtime.errors import OutriderError
from .bandwidth import device_bandwidths, link_bandwidth, read_bandwidth
from .fence import Fence
from .records import Bandwidths, Passage

CLOSE_TIMEOUT_S = 20.0


class WorkerError(OutriderError):
    """A measuring process ended or answered with what is no answer."""


class Worker:
    """A child process that serves the methods of one object. Calls block; a context manager."""

    def __init__(
        self,
        kind: str,
        options: Mapping[str, Any],
        *,
        num_threads: int | None,
        fence: Fence | None = None,
    ) -> None:
        environment = dict(os.environ)
        if num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(num_threads)
        self._kind = kind
        self._process = subprocess.Popen(
            [*_command(kind, options), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._num_asked = 0
        if fence is not None:
            fence.admit(self._process.pid)

    def ask(self, method: str, *arguments: Any) -> None:
        """Start a call; `answer` gives its result. Does not block."""
        assert self._process.stdin is not None
        line = msgspec.json.encode({"method": method, "arguments": arguments}) + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error
        self._num_asked += 1

    def answer(self, kind: Any) -> Any:
        """The result of the oldest call not answered yet, as `kind`. Blocks.

        Raises the child's OutriderError, or WorkerError if it ended without an answer.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        self._num_asked -= 1
        reply = msgspec.json.decode(line)
        if "error" in reply:
            raise _error(reply)
        return msgspec.convert(reply["result"], kind)

    def call(self, method: str, *arguments: Any, kind: Any) -> Any:
        """`ask`, then `answer`."""
        self.ask(method, *arguments)
        return self.answer(kind)

    def close(self) -> None:
        """End the child: it sees the end of its input. Killed if that takes 20 s; idempotent."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _gone(self) -> WorkerError:
        code = self._process.poll()
        return WorkerError(
            f"the process of arm {self._kind!r} ended"
            + (f" with exit code {code}" if code is not None else "")
            + "; a negative code is a signal (-9: killed, as by a memory limit)"
        )


def _command(kind: str, options: Mapping[str, Any]) -> list[str]:
    if kind == "llama.cpp":
        return [options["python"], str(Path(__file__).with_name("llama_arm.py"))]
    return [sys.executable, "-m", "outrider.bench.worker", kind]


class Probe:
    """Measures bandwidths in a process that holds no model."""

    def measure(self, files: list[str], device: str, seed: int) -> Bandwidths:
        """Both bandwidths, now. Blocks for some 0.3 s.

        Of a CUDA device its own memory's, and the link's from pinned host memory.
        """
        if device.startswith("cuda"):
            return Bandwidths(*device_bandwidths(device), "pinned")
        link = link_bandwidth([Path(file) for file in files], seed=seed)
        reads = "direct" if link.is_direct else "buffered"
        return Bandwidths(read_bandwidth(), link.bytes_per_s, reads)

    def close(self) -> None:
        """Nothing to free."""


def _engine_arm(options: dict[str, Any]) -> Any:
    from .arm import EngineArm

    return EngineArm(**options)


def _alone_arm(options: dict[str, Any]) -> Any:
    from .alone import AloneArm

    return AloneArm(**options)


def _accelerate_arm(options: dict[str, Any]) -> Any:
    from .accelerate_arm import AccelerateArm

    return AccelerateArm(**options)


# What a child can serve; another system's arm is one more line.
ARMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "engine": _engine_arm,
    "alone": _alone_arm,
    "accelerate": _accelerate_arm,
    "probe": lambda _: Probe(),
}
_METHODS = frozenset({"load", "encode", "record", "prepare", "run", "measure", "timeline"})


def serve(kind: str, options: dict[str, Any]) -> None:
    """The child: answers calls until its input ends."""
    # Whatever a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    served: Any = None
    for line in sys.stdin.buffer:
        try:
            if served is None:
                served = ARMS[kind](options)
            call = msgspec.json.decode(line)
            if call["method"] not in _METHODS:
                raise WorkerError(f"unknown method {call['method']!r}")
            result = getattr(served, call["method"])(*_typed(call["arguments"]))
            reply: dict[str, Any] = {"result": result}
        except OutriderError as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        answers.write(msgspec.json.encode(reply) + b"\n")
    if served is not None:
        served.close()


def _typed(arguments: list[Any]) -> list[Any]:
    def typed(argument: Any) -> Any:
        if isinstance(argument, list) and argument and isinstance(argument[0], dict):
            return msgspec.convert(argument, list[Passage])
        return argument

    return [typed(argument) for argument in arguments]


def _error(reply: Mapping[str, str]) -> OutriderError:
    kind = getattr(errors, reply["error"], WorkerError)
    if kind is errors.FieldError:
        kind = errors.UsageError
    return kind(reply["message"])


if __name__ == "__main__":
    try:
        serve(sys.argv[1], json.loads(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
