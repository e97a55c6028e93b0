"""Streams and their ends: a client that leaves, one that does not read, a server that is slow."""

import asyncio
import json
import socket

import pytest
from scripted_client import Hold, chunk, done, spoken
from served_gateway import PATIENCE_S, eventually, run_gateway

from outrider.runtime.serving.gateway.generation import Settings
from outrider.runtime.serving.gateway.refusal import Refusal
from outrider.runtime.serving.gateway.stream import EventStream

COMPLETIONS = "/v1/completions"


def events(reply):
    """The documents of a finished event stream."""
    parts = reply.text.split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ") for part in parts[:-1]]


def test_a_stream_is_framed_and_ends_with_done(gateway):
    gateway.upstream.script = lambda request: spoken("a\ndata: b", "\r\n\r\n")
    reply = gateway.http.post(COMPLETIONS, json={"prompt": "Hi", "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    found = events(reply)
    assert found[-1] == "[DONE]"
    texts = [json.loads(one)["choices"][0]["text"] for one in found[:-1]]
    assert texts == ["a\ndata: b", "\r\n\r\n", ""]


def test_a_chunk_is_sent_before_the_next_one_is_there(gateway):
    hold = Hold()
    gateway.upstream.script = lambda request: [chunk(0, "first"), hold, chunk(1, "second"), done(2)]
    with gateway.http.stream("POST", COMPLETIONS, json={"prompt": "Hi", "stream": True}) as reply:
        lines = reply.iter_lines()
        assert "first" in next(lines)
        assert not hold.is_released.is_set()
        hold.is_released.set()
        assert "data: [DONE]" in list(lines)
    assert not gateway.upstream.was_cancelled.is_set()


def request_bytes(**body):
    raw = json.dumps({"prompt": "Hi"} | body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("num_chunks", [0, 1])
def test_a_client_that_leaves_cancels_its_request(gateway, is_stream, num_chunks):
    hold = Hold()
    gateway.upstream.script = lambda request: [
        *(chunk(seq, "text") for seq in range(num_chunks)), hold, done(num_chunks)
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S) as connection:
        connection.sendall(request_bytes(stream=is_stream))
        assert hold.is_reached.wait(PATIENCE_S)
        assert not gateway.upstream.was_cancelled.is_set()
    assert gateway.upstream.was_cancelled.wait(PATIENCE_S)
    assert eventually(
        lambda: 'route="/v1/completions",status="499"' in gateway.http.get("/metrics").text
    )
    gateway.upstream.script = lambda request: spoken("again")
    assert gateway.http.post(COMPLETIONS, json={"prompt": "Hi"}).status_code == 200


def test_one_that_leaves_does_not_disturb_another(gateway):
    holds = {"leaves": Hold(), "stays": Hold()}
    gateway.upstream.script = lambda request: [
        chunk(0, "a"),
        holds[request.prompt],
        chunk(1, "b"),
        done(2),
    ]
    stay = {"prompt": "stays", "stream": True}
    with gateway.http.stream("POST", COMPLETIONS, json=stay) as reply:
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S) as other:
            other.sendall(request_bytes(prompt="leaves", stream=True))
            assert holds["leaves"].is_reached.wait(PATIENCE_S)
        assert gateway.upstream.was_cancelled.wait(PATIENCE_S)
        holds["stays"].is_released.set()
        assert list(reply.iter_lines())[-2] == "data: [DONE]"


def test_one_that_never_reads_is_cut(gateway):
    endless = ("x" * 4096 for _ in range(100_000))
    with run_gateway(settings=Settings(write_timeout_s=0.5)) as own:
        own.upstream.script = lambda request: (chunk(seq, text) for seq, text in enumerate(endless))
        with socket.create_connection(("127.0.0.1", own.port), timeout=PATIENCE_S) as connection:
            connection.sendall(request_bytes(stream=True))
            assert own.upstream.was_cancelled.wait(PATIENCE_S)


def test_a_refusal_before_the_first_event_is_a_plain_answer():
    async def refused():
        raise Refusal(429, "full", code="overloaded")
        yield b""

    sent = serve(EventStream(refused(), write_timeout_s=9))
    assert sent[0]["status"] == 429
    assert json.loads(sent[1]["body"])["error"]["code"] == "overloaded"


def test_a_refusal_after_the_first_event_is_an_event():
    async def refused():
        yield b"data: 1\n\n"
        raise Refusal(500, "gone", code="internal")

    sent = serve(EventStream(refused(), write_timeout_s=9))
    assert sent[0]["status"] == 200
    assert json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]["message"] == "gone"
    assert not sent[-1]["more_body"] and b"[DONE]" not in b"".join(m["body"] for m in sent[1:])


def test_while_nothing_comes_comments_keep_the_connection():
    async def slow():
        await asyncio.sleep(0.2)
        yield b"data: 1\n\n"

    bodies = [
        m["body"] for m in serve(EventStream(slow(), write_timeout_s=9, keep_alive_s=0.02))[1:]
    ]
    assert bodies[0] == b": waiting\n\n" and bodies[-2] == b"data: 1\n\n"


def serve(response):
    """The messages that a response sends to a client that stays."""
    sent = []

    async def send(message):
        sent.append(message)

    async def call():
        await response({"type": "http"}, asyncio.Event().wait, send)

    asyncio.run(call())
    return sent
