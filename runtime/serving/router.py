"""The server's socket: frames in, frames out, and what a peer that cannot take them is owed.

Knows clients by their routing ids and messages by their frames. One thread at a time, which whoever
calls sees to: a socket may move between threads under a lock, zmq_socket(3).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import zmq

from .clock import AwakeClock
from .messages import NUM_FRAMES

# Plain numbers: an operation on an enum costs more than the call that it is for.
_MORE, _LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
Sent = Literal["sent", "kept", "dropped", "gone"]
# Messages kept for a client whose pipe is full; more would be memory without bound.
MAX_KEPT = 1024


@dataclass(slots=True)
class _Backlog:
    frames: deque[tuple[list[bytes], bool]] = field(default_factory=deque)
    since_s: float = 0.0


class Router:
    """Sends without ever blocking: what a full pipe does not take is kept and tried again."""

    def __init__(self, socket: zmq.Socket, *, clock: AwakeClock) -> None:
        self.socket = socket
        self._clock = clock
        self._backlogs: dict[bytes, _Backlog] = {}

    @property
    def descriptor(self) -> int:
        """What a thread may poll without owning the socket: readable when there is news.

        News is told once, and may have been used up by any call since: ask `has_input` too.
        """
        return int(self.socket.get(zmq.FD))

    @property
    def has_input(self) -> bool:
        """Whether `receive` would give something."""
        return int(self.socket.get(_EVENTS)) & _POLLIN != 0

    @property
    def num_kept(self) -> int:
        """Messages that wait for a full pipe."""
        if not self._backlogs:
            return 0
        return sum(len(backlog.frames) for backlog in self._backlogs.values())

    def receive(self) -> tuple[bytes, list[bytes], int] | None:
        """(client, frames, how many there were) of the next message, None if there is none.

        Frames beyond those that a message can have are thrown away as they are read.
        """
        try:
            client = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        frames: list[bytes] = []
        num_frames = 0
        while self.socket.get(zmq.RCVMORE):
            frame = self.socket.recv()
            num_frames += 1
            if num_frames <= NUM_FRAMES:
                frames.append(frame)
        return client, frames, num_frames

    def send(self, client: bytes, frames: list[bytes], *, is_last: bool = False) -> Sent:
        """Send or keep a message of a request; `is_last` marks its last one.

        "dropped" if too many are kept already (a last one is kept all the same).
        """
        backlog = self._backlogs.get(client)
        if backlog is None:
            sent = self._try_send(client, frames)
            if sent != "dropped":
                return sent
            backlog = self._backlogs[client] = _Backlog(since_s=self._clock.now_s)
        if len(backlog.frames) >= MAX_KEPT and not is_last:
            return "dropped"
        backlog.frames.append((frames, is_last))
        return "kept"

    def answer(self, client: bytes, frames: list[bytes]) -> Sent:
        """Send an answer that may be lost: a client that does not read needs none."""
        if client in self._backlogs:
            return "dropped"
        return self._try_send(client, frames)

    def retry(self) -> list[bytes]:
        """Try again what is kept; returns the clients that turn out to have gone."""
        return [client for client in list(self._backlogs) if self._retry(client) == "gone"]

    def slow(self, limit_s: float) -> list[bytes]:
        """Clients whose pipe has taken nothing for `limit_s`."""
        now = self._clock.now_s
        return [
            client for client, backlog in self._backlogs.items() if now - backlog.since_s >= limit_s
        ]

    def cut(self, client: bytes) -> bool:
        """Drop what is kept for a client but for last messages; False if that was all there was."""
        backlog = self._backlogs[client]
        last = deque(item for item in backlog.frames if item[1])
        if len(last) == len(backlog.frames):
            del self._backlogs[client]
            return False
        backlog.frames, backlog.since_s = last, self._clock.now_s
        return True

    def _retry(self, client: bytes) -> Sent:
        backlog = self._backlogs[client]
        while backlog.frames:
            sent = self._try_send(client, backlog.frames[0][0])
            if sent == "dropped":
                return "kept"
            if sent == "gone":
                del self._backlogs[client]
                return "gone"
            backlog.frames.popleft()
            backlog.since_s = self._clock.now_s
        del self._backlogs[client]
        return "sent"

    def _try_send(self, client: bytes, frames: list[bytes]) -> Sent:
        send = self.socket.send
        try:
            # The first frame alone can be refused: a message is taken whole or not at all.
            send(client, _MORE)
            for frame in frames[:-1]:
                send(frame, _MORE)
            send(frames[-1], _LAST)
        except zmq.Again:
            return "dropped"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "gone"
        return "sent"
