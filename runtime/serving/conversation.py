"""A client's side of one request, without a socket: credit, order, and how it can end."""

from itertools import count

from ..errors import OutriderError, UsageError
from .messages import (
    LIMITS,
    Chunk,
    Done,
    Error,
    Generate,
    Message,
    Pong,
    ServerMessage,
    encode,
)

DEFAULT_CREDIT = 64
# Silent polls, each a part of the time-out, after which a server counts as lost: a machine that
# was stopped for a while wakes to a first time-out that says nothing.
NUM_SILENT_POLLS = 4


class ServerError(OutriderError):
    """The server refused or failed a request, as `error` says; so do `code` and `field`."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error
        self.code = error.code
        self.field = error.field
        self.retry_after_ms = error.retry_after_ms
        self.exit_code = UsageError.exit_code if error.code == "invalid_request" else 1


class ConnectionLost(OutriderError):
    """No server answers, or the one that does no longer knows the request."""

    @classmethod
    def silent(cls, address: str, timeout_s: float) -> "ConnectionLost":
        """Nothing came back at all."""
        return cls(
            f"no answer from {address} within {timeout_s:g} s: check that `outrider serve` runs "
            "there, and that the keys are the right ones if it asks for keys"
        )


class RequestIds:
    """Ids that differ from each other within one connection."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def new(self) -> bytes:
        """The next id, eight bytes."""
        return next(self._numbers).to_bytes(8, "big")


class Conversation:
    """What has come of one request so far. `credit` CHUNKs are granted ahead of being taken."""

    def __init__(self, address: str, *, credit: int) -> None:
        self.has_ended = False
        self._address = address
        self._window = credit
        self._num_taken = 0
        self._num_chunks = 0

    def accept(self, reply: ServerMessage) -> Chunk | Done | None:
        """What a message of this request brings; None if it brings nothing to hand on.

        Raises ServerError for an ERROR, ConnectionLost if messages are missing.
        """
        if isinstance(reply, Chunk):
            self._check(reply.seq == self._num_chunks, f"chunk {reply.seq} after", self._num_chunks)
            self._num_chunks += 1
            return reply
        if isinstance(reply, Done):
            self.has_ended = True
            self._check(reply.num_chunks == self._num_chunks, "the end after", self._num_chunks)
            return reply
        if isinstance(reply, Error):
            self.has_ended = True
            raise ServerError(reply)
        if isinstance(reply, Pong) and not reply.is_open:
            self.has_ended = True
            raise ConnectionLost(
                f"the connection to {self._address} broke and the request with it: the server "
                "no longer knows it; send it again"
            )
        return None

    def taken(self) -> int:
        """One CHUNK was used up: how many more to grant now, mostly 0."""
        self._num_taken += 1
        if self._num_taken * 2 < self._window:
            return 0
        granted, self._num_taken = self._num_taken, 0
        return granted

    def _check(self, is_whole: bool, what: str, num_chunks: int) -> None:
        if not is_whole:
            raise ConnectionLost(
                f"messages from {self._address} are missing: {what} {num_chunks} chunks"
            )


def checked_frames(message: Message | Generate, request_id: bytes) -> list[bytes]:
    """The frames of a message that a server will not drop for its size. Raises UsageError."""
    frames = encode(message, request_id)
    limit = int(LIMITS["message_bytes"].maximum)
    if len(frames[-1]) > limit:
        raise UsageError(
            f"the request has {len(frames[-1]):,} bytes as a message: accepted are {limit:,}; "
            "shorten the prompt"
        )
    return frames
