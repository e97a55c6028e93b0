"""Where a server may be reached: parsed, refused if others could reach it, held by one process.

An ipc socket lies in a folder of mode 0700 beside a lock file. Knows no messages.
"""

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from ..errors import UsageError

# sockaddr_un.sun_path, without its terminating NUL (man 7 unix).
MAX_PATH_BYTES = 107
_SOCKET_NAME = "engine.sock"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed address: `path` of an ipc socket, else `host` and `port` (0: any free one)."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @property
    def address(self) -> str:
        """As ZeroMQ takes it."""
        if self.path is not None:
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port or '*'}"

    @property
    def is_local(self) -> bool:
        """Whether it is reached from this machine only."""
        return self.path is not None or ipaddress.ip_address(self.host).is_loopback


def default_address() -> str:
    """The ipc address of this user's server."""
    return f"ipc://{_own_folder() / _SOCKET_NAME}"


def _own_folder() -> Path:
    # Where no runtime folder was made for the user (containers, su), a folder in its home: one in
    # /tmp could be put there by anybody first.
    given = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(given or f"/run/user/{os.geteuid()}")
    if given or folder.is_dir():
        return folder / "outrider"
    return Path(platformdirs.user_state_dir("outrider"))


def parse(address: str) -> Endpoint:
    """ipc://PATH or tcp://HOST:PORT with a numeric host or localhost. Raises UsageError."""
    scheme, separator, rest = address.partition("://")
    if separator and scheme == "ipc":
        return _parse_path(rest, address)
    if separator and scheme == "tcp":
        host, _, port = rest.rpartition(":")
        host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            host = ""
        if host and port.isascii() and port.isdecimal() and int(port) < 65536:
            return Endpoint(host=host, port=int(port))
    raise UsageError(
        f"address {address!r}: accepted are ipc:///absolute/path and tcp://ADDRESS:PORT with a "
        "numeric address or localhost, such as tcp://127.0.0.1:5555"
    )


def _parse_path(rest: str, address: str) -> Endpoint:
    if not rest.startswith("/"):
        raise UsageError(
            f"address {address!r}: accepted is ipc:///absolute/path; an abstract socket (@name) "
            "has no permissions and could be opened by every user of the machine"
        )
    if len(os.fsencode(rest)) > MAX_PATH_BYTES or "\0" in rest:
        raise UsageError(
            f"address {address!r}: the path has {len(os.fsencode(rest))} bytes and a socket's may "
            f"have {MAX_PATH_BYTES}; give a shorter one"
        )
    return Endpoint(path=Path(rest))


def refuse_exposed(endpoint: Endpoint, *, has_keys: bool) -> None:
    """UsageError if other machines could reach the endpoint and no keys are asked for."""
    if not endpoint.is_local and not has_keys:
        raise UsageError(
            f"bind {endpoint.address}: other machines can reach this address: give --keys DIR "
            "(made by outrider serve --make-keys DIR), or bind to ipc:// or 127.0.0.1"
        )


class Claim:
    """The right to bind an endpoint. A context manager; an ipc socket's file goes with it.

    Raises UsageError if another process holds it or its folder is open to others. Never blocks.
    The lock is the operating system's: it ends with the process, however that ends.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._path = endpoint.path
        self._lock: filelock.FileLock | None = None

    def __enter__(self) -> "Claim":
        if self._path is None:
            return self
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(self._path.parent)
        lock = filelock.FileLock(f"{self._path}.lock", mode=0o600, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UsageError(
                f"bind ipc://{self._path}: another server holds this address; stop it, or bind "
                "to another path"
            ) from None
        self._lock = lock
        if self._path.is_socket():
            # Nobody holds the lock, so its server has ended without taking it away.
            self._path.unlink()
        elif self._path.exists():
            self._release()
            raise UsageError(f"bind ipc://{self._path}: a file that is no socket lies there")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def check_folder(folder: Path) -> None:
    """UsageError unless the folder is this user's and closed to all others."""
    found = folder.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        raise UsageError(
            f"{folder} belongs to user {found.st_uid}: a server's socket needs a "
            "folder of its own user"
        )
    if mode & 0o077:
        raise UsageError(
            f"{folder} has mode {mode:04o}, so other users could reach the socket in it: accepted "
            f"is 0700; run chmod 700 {folder}, or give a folder of its own"
        )
