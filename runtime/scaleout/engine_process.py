"""A server of this machine as a child process: started, waited for, never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from ..errors import OutriderError

_PR_SET_PDEATHSIG = 1
_SOCKET_NAME = "engine.sock"
_PREFIX = "outrider-engine-"


class EngineEnded(OutriderError):
    """The server's process ended before it could be reached; the message has its last words."""


class EngineProcess:
    """`outrider serve` on an ipc socket in a folder of its own; ends with this process.

    `words` are what follows `outrider serve`, `environment` comes on top of this process's.
    `on_end` is called from another thread when the server ends by itself.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        on_end: Callable[[int], None] = lambda code: None,
    ) -> None:
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self.address = f"ipc://{self._folder / _SOCKET_NAME}"
        self._command = [
            sys.executable, "-m", __name__, str(os.getpid()),
            "serve", *words, "--bind", self.address,
        ]  # fmt: skip
        self._environment = os.environ | dict(environment)
        self._on_end = on_end
        self._is_closing = False
        self._is_serving = False
        self._code = 0
        self._last_words: deque[str] = deque(maxlen=2)
        self._ready = threading.Event()
        # The kernel's death signal is sent when the *thread* that made the child ends: this one
        # lives as long as the child.
        self._thread = threading.Thread(target=self._live, name="engine-process", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until clients can connect. Raises EngineEnded."""
        self._ready.wait()
        if not self._is_serving:
            self._remove()
            words = " / ".join(self._last_words) or "it said nothing"
            raise EngineEnded(f"the engine ended with code {self._code} before it served: {words}")

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Tell it to stop, and end it if it has not within `timeout_s`. Idempotent; blocks."""
        self._is_closing = True
        if self._thread.is_alive():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()
        self._remove()

    def _live(self) -> None:
        self._process = process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        log = threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True)
        log.start()
        is_serving = bool(process.stdout.readline())
        if is_serving:
            self._is_serving = True
            self._ready.set()
        process.stdout.read()
        self._code = process.wait()
        log.join()
        process.stdout.close()
        process.stderr.close()
        self._ready.set()
        if is_serving and not self._is_closing:
            # Whoever is told may end this process on the spot.
            self._remove()
            self._on_end(self._code)

    def _pass_on(self, log: IO[str]) -> None:
        """The server's log goes where this process's goes; its end is kept for an error."""
        for line in log:
            self._last_words.append(line.strip())
            sys.stderr.write(line)

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the folders of processes that were killed; their sockets lead nowhere."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays


def main() -> None:
    """In the child: die with the parent, however that ends; then be `outrider`."""
    parent = int(sys.argv.pop(1))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it was gone before the kernel was asked
    from ..cli import main as outrider

    outrider()


if __name__ == "__main__":
    main()
