"""The protocol by hand: pyzmq and msgpack, nothing of ours, as a client in another language has it.

Waits are counted in polls of a second, many of them: the machine may stand still meanwhile.
Run as a program it takes an address, a prompt and a number of tokens, and says when they flow.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import zmq

HELLO, GENERATE, CREDIT, CANCEL, PING, STATS = 1, 2, 3, 4, 5, 6
READY, CHUNK, DONE, ERROR, PONG, STATS_REPLY = 0x81, 0x82, 0x83, 0x84, 0x85, 0x86
NUM_POLLS = 120


class Wire:
    """One DEALER connection."""

    def __init__(self, address: str, *, identity: bytes = b"", **options: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        if identity:
            self.socket.set(zmq.IDENTITY, identity)
        for name, value in options.items():
            self.socket.set(getattr(zmq, name), value)
        self.socket.connect(address)

    def send(
        self, kind: int, request_id: bytes = b"", body: Any = None, *, version: int = 1
    ) -> None:
        self.socket.send_multipart([bytes([version, kind]), request_id, msgpack.packb(body or {})])

    def receive(self, *, num_polls: int = NUM_POLLS) -> tuple[int, bytes, dict[str, Any]]:
        for _ in range(num_polls):
            if self.socket.poll(1000):
                header, request_id, body = self.socket.recv_multipart()
                assert header[0] == 1
                if header[1] == PONG and not request_id:
                    continue  # the server looks for clients that have gone
                return header[1], request_id, msgpack.unpackb(body)
        raise AssertionError("the server said nothing")

    def ask(
        self, kind: int, request_id: bytes = b"q", body: Any = None
    ) -> tuple[int, dict[str, Any]]:
        """Send and take the answer with the same id; others are passed over."""
        self.send(kind, request_id, body)
        for _ in range(100_000):
            found, answered, content = self.receive()
            if answered == request_id:
                return found, content
        raise AssertionError("no answer among very many messages")

    def generate(self, request_id: bytes, prompt: str, num_tokens: int, **fields: Any) -> None:
        body = {"prompt": prompt, "max_tokens": num_tokens, "stream": True, "credit": 100_000}
        self.send(GENERATE, request_id, body | fields)

    def collect(self, request_id: bytes) -> tuple[bytes, str, int, dict[str, Any]]:
        """As `gather`, with the double's tokens as the bytes that they are."""
        tokens, *rest = self.gather(request_id)
        return bytes(tokens), *rest

    def gather(self, request_id: bytes) -> tuple[list[int], str, int, dict[str, Any]]:
        """(token ids, text, type of the last message, its body) of one request."""
        tokens: list[int] = []
        text = ""
        for _ in range(100_000):
            kind, answered, content = self.receive()
            if answered != request_id:
                continue
            if kind == CHUNK:
                tokens += content["token_ids"]
                text += content["text"]
            elif kind in (DONE, ERROR):
                return tokens, text, kind, content
        raise AssertionError("the request never ended")

    def stats(self) -> dict[str, Any]:
        kind, content = self.ask(STATS, b"stats")
        assert kind == STATS_REPLY
        return content

    def settle(self) -> dict[str, Any]:
        """STATS once nothing is open any more; bounded."""
        for _ in range(600):
            stats = self.stats()
            if stats["requests_running"] == stats["requests_waiting"] == 0:
                return stats
            self.socket.poll(100)
        raise AssertionError(f"requests never ended: {stats}")

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@contextmanager
def wire(address: str, **options: Any) -> Iterator[Wire]:
    one = Wire(address, **options)
    try:
        yield one
    finally:
        one.close()


def reconcile(stats: dict[str, Any]) -> None:
    """What must hold of the counters whenever nothing is open: nothing lost, nothing held."""
    assert stats["requests_running"] == stats["requests_waiting"] == 0
    assert stats["requests_started_total"] == sum(stats["requests_total"].values())
    assert stats["e2e_request_latency_seconds"]["count"] == stats["requests_started_total"]
    assert stats["expert_cache_bytes"] == 0  # the double's KV memory


def main(address: str, prompt: str, num_tokens: int) -> None:
    """Take a stream to its end, one line on stdout at its first chunk."""
    with wire(address) as one:
        one.generate(b"a", prompt, num_tokens)
        one.receive()
        sys.stdout.write("flows\n")
        sys.stdout.flush()
        one.collect(b"a")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
