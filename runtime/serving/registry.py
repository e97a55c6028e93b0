"""Which requests are open, whose they are, and whether another one may join. One thread."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import count

from .messages import Error
from .work import Key

_MIN_RETRY_MS, _MAX_RETRY_MS = 100, 30_000
# Weight of the newest request in the mean duration.
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How many requests may be open: sharing passes, waiting, and of one client."""

    max_running: int
    max_waiting: int
    max_per_client: int


class Registry:
    """The open requests. Whatever is opened is closed exactly once."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._serials = count()
        self._clients: defaultdict[bytes, dict[bytes, Key]] = defaultdict(dict)
        self._num_open = 0
        self._mean_s = 1.0

    def __len__(self) -> int:
        return self._num_open

    def find(self, client: bytes, request_id: bytes) -> Key | None:
        """The open request of this client with this id."""
        return self._clients.get(client, {}).get(request_id)

    def of(self, client: bytes) -> list[Key]:
        """Every open request of a client."""
        return list(self._clients.get(client, {}).values())

    def clients(self) -> list[bytes]:
        """Clients with open requests."""
        return list(self._clients)

    def every(self) -> list[Key]:
        """Every open request."""
        return [key for keys in self._clients.values() for key in keys.values()]

    def open(self, client: bytes, request_id: bytes) -> Key | Error:
        """Open a request, or say why it cannot be."""
        mine = self._clients.get(client, {})
        if request_id in mine:
            return Error(
                code="duplicate_id",
                message="a request with this id is open; it goes on, this one was refused",
            )
        limits = self._limits
        if len(mine) >= limits.max_per_client:
            return self._overloaded(f"{len(mine)} requests of this client are open")
        if self._num_open >= limits.max_running + limits.max_waiting:
            return self._overloaded(f"{self._num_open} requests are open")
        key = Key(client, request_id, next(self._serials))
        self._clients[client][request_id] = key
        self._num_open += 1
        return key

    def close(self, key: Key, *, duration_s: float | None = None) -> bool:
        """Close a request; False if it was closed before."""
        if self.find(key.client, key.request_id) != key:
            return False
        del self._clients[key.client][key.request_id]
        if not self._clients[key.client]:
            del self._clients[key.client]
        self._num_open -= 1
        if duration_s is not None:
            self._mean_s += _SMOOTHING * (duration_s - self._mean_s)
        return True

    def _overloaded(self, what: str) -> Error:
        # Until as many have ended as are waiting now, at the pace of late.
        num_waiting = max(1, self._num_open - self._limits.max_running + 1)
        wait_s = self._mean_s * num_waiting / self._limits.max_running
        retry_ms = min(max(round(1000 * wait_s), _MIN_RETRY_MS), _MAX_RETRY_MS)
        return Error(
            code="overloaded",
            message=f"{what}, which is the limit; try again in about {retry_ms} ms",
            retry_after_ms=retry_ms,
        )
