"""Counts what happens to connections below the messages: accepted, broken, refused."""

from collections import Counter

import zmq
from zmq.utils.monitor import parse_monitor_message

_NAMES = {
    int(zmq.Event.ACCEPTED): "accepted",
    int(zmq.Event.ACCEPT_FAILED): "accept_failed",
    int(zmq.Event.DISCONNECTED): "disconnected",
    int(zmq.Event.HANDSHAKE_SUCCEEDED): "handshake_succeeded",
    int(zmq.Event.HANDSHAKE_FAILED_AUTH): "handshake_refused",
    int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL): "handshake_malformed",
    int(zmq.Event.HANDSHAKE_FAILED_NO_DETAIL): "handshake_failed",
}
_MAX_READ = 256


class Monitor:
    """The monitor of a socket, read into `counts`."""

    def __init__(self, socket: zmq.Socket, counts: Counter[str]) -> None:
        self._watched = socket
        self._counts = counts
        events = 0
        for value in _NAMES:
            events |= value
        self.socket = socket.get_monitor_socket(events)
        for name in _NAMES.values():
            counts[name] = 0

    def read(self) -> bool:
        """Count what has happened; True if some connection broke."""
        before = self._counts["disconnected"]
        for _ in range(_MAX_READ):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            name = _NAMES.get(int(parse_monitor_message(frames)["event"]))
            if name is not None:
                self._counts[name] += 1
        return self._counts["disconnected"] > before

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self.socket.close(linger=0)
