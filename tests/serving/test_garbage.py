"""Bytes that are no message of ours: refused with a reason or dropped, and the service goes on."""

import contextlib
import random
import socket

import msgpack
import psutil
import pytest
import wire as by_hand
from served_double import answer
from wire import CHUNK, DONE, ERROR, GENERATE, HELLO, PING, PONG

SERVER = {"address": "tcp://127.0.0.1:0", "link": {"handshake_s": 1.0}}
REQUEST = {"prompt": "p", "max_tokens": 2}


def port_of(server) -> tuple[str, int]:
    return "127.0.0.1", int(server.address.rpartition(":")[2])


def refusal(wire, body: bytes, *, kind: int = GENERATE) -> dict:
    wire.socket.send_multipart([bytes([1, kind]), b"a", body])
    found, request_id, error = wire.receive()
    assert (found, request_id) == (ERROR, b"a")
    return error


def still_serves(wire) -> None:
    wire.generate(b"after", "all is well", 10)
    assert wire.collect(b"after")[:3:2] == (answer("all is well", 10), DONE)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(random.Random(1).randbytes(4096), id="random"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="http"),
        pytest.param(bytes.fromhex("1603010200010001fc0303") + bytes(500), id="tls"),
        pytest.param(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x09NULL" + bytes(200), id="zmtp-9"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_bytes_of_other_protocols_do_no_harm(server, wire, sent):
    wire.generate(b"a", "goes on", 100)
    with socket.create_connection(port_of(server), timeout=60) as other:
        other.sendall(sent)
        # What begins like ZMTP 1.0, as most text does, waits for the rest of a frame; all else is
        # closed by the server, at the handshake's limit at the latest.
        other.settimeout(2 if sent[:1] not in (b"", b"\xff", b"\x16") else 60)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while other.recv(4096):
                pass
    tokens, _, kind, _ = wire.collect(b"a")
    assert (tokens, kind) == (answer("goes on", 100), DONE)


def test_a_message_of_zmtp_1_is_decoded_with_doubt_like_any_other(server, wire):
    before = wire.stats()["rejected_total"].get("invalid_request", 0)

    def frame(body: bytes, *, more: bool) -> bytes:
        return bytes([len(body) + 1, int(more)]) + body

    with socket.create_connection(port_of(server), timeout=60) as old:
        old.sendall(frame(b"", more=False) + frame(b"rubbish", more=True) + frame(b"", more=False))
        for _ in range(100):
            if wire.stats()["rejected_total"].get("invalid_request", 0) > before:
                break
            wire.socket.poll(50)
        else:
            raise AssertionError("it never reached the decoder")
    refused = server.events("message refused")[-1]
    assert refused["code"] == "invalid_request"
    still_serves(wire)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 10_000])
def test_a_wrong_number_of_frames_is_refused(wire, num_frames):
    wire.socket.send_multipart([b"\x01\x02"] * num_frames)
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "invalid_request")
    assert f"this one has {num_frames}" in error["message"]
    still_serves(wire)


def test_empty_frames_are_refused(wire):
    wire.socket.send_multipart([b"", b"", b""])
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "unsupported_version")
    assert refusal(wire, b"")["code"] == "invalid_request"


def test_a_frame_that_is_too_large_costs_its_connection_only(server, wire):
    wire.generate(b"a", "goes on", 100)
    with by_hand.wire(server.address) as big:
        assert big.ask(PING)[0] == PONG
        big.socket.send_multipart([b"\x01\x02", b"b", bytes((4 << 20) + 1)])
        # libzmq drops the connection without a word and makes it again by itself.
        for _ in range(60):
            big.send(PING, b"again")
            if big.socket.poll(1000):
                break
        kind, request_id, _ = big.receive()
        assert (kind, request_id) == (PONG, b"again")
    assert wire.collect(b"a")[0] == answer("goes on", 100)


NESTED = b"\x91" * 100_000
BODIES = {
    "truncated": msgpack.packb(REQUEST)[:-1],
    "trailing": msgpack.packb(REQUEST) + b"\x00",
    "no-map": msgpack.packb([1, 2]),
    "depth-bomb": b"\x81\xa6prompt" + NESTED,
    "lying-array": b"\x82\xb0prompt_token_ids\xdd\xff\xff\xff\xff\x01\xaamax_tokens\x01",
    "lying-map": b"\xdf\xff\xff\xff\xff\xa6prompt\xa1p",
    "lying-string": b"\x81\xa6prompt\xdb\xff\xff\xff\xff" + b"p" * 100,
    "bad-utf-8": b"\x81\xa6prompt\xa2\xff\xfe",
    "repeated-key": b"\x82\xa6prompt\xa1p\xa6prompt\xa1q",
    "nan": msgpack.packb(REQUEST | {"temperature": float("nan")}),
    "unknown-ext": msgpack.packb(REQUEST | {"prompt": msgpack.ExtType(42, b"x" * 100)}),
    "big-integer": b"\x82\xa6prompt\xa1p\xaamax_tokens\xcf" + b"\xff" * 8,
    "integer-key": b"\x82\x01\xa1p\xaamax_tokens\x01",
    "empty-maps": b"\xdc\xff\xff" + b"\x80" * 0xFFFF,
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused_with_its_reason(wire, name):
    error = refusal(wire, BODIES[name])
    assert error["code"] == "invalid_request" and error["message"]
    if name == "nan":
        assert error["field"] == "temperature"
    if name == "big-integer":
        assert error["field"] == "max_tokens"
    still_serves(wire)


def test_a_flood_of_malformed_bodies_takes_no_memory(server, wire):
    process = psutil.Process(server.process.pid)
    for name in BODIES:
        refusal(wire, BODIES[name])
    before = process.memory_info().rss
    maps = b"\xdd" + (1 << 20).to_bytes(4, "big") + b"\x80" * (1 << 20)
    for _ in range(10):
        assert refusal(wire, b"\x81\xa6prompt" + maps)["code"] == "invalid_request"
        for name in BODIES:
            refusal(wire, BODIES[name])
    assert process.memory_info().rss - before < 32 << 20


def test_unknown_versions_and_types_are_told_what_is_supported(wire):
    for version, kind in ((2, HELLO), (0, HELLO), (1, 0x7F), (1, 0x82)):
        wire.send(kind, b"a", {}, version=version)
        found, request_id, error = wire.receive()
        assert (found, request_id, error["code"]) == (ERROR, b"a", "unsupported_version")
        assert error["supported"] == [1]
        assert "0x02 Generate" in error["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (REQUEST | {"temprature": 1.0}, "temprature"),
        ({"max_tokens": 2}, "prompt"),
        (REQUEST | {"max_tokens": "2"}, "max_tokens"),
        (REQUEST | {"stop": 7}, "stop"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        (REQUEST | {"prompt_token_ids": [1]}, "prompt_token_ids"),
    ],
)
def test_fields_that_are_unknown_missing_or_wrong_are_named(wire, body, field):
    error = refusal(wire, msgpack.packb(body))
    assert (error["code"], error["field"]) == ("invalid_request", field)


def test_an_id_that_is_too_long_is_refused(wire):
    wire.socket.send_multipart([bytes([1, PING]), b"x" * 33, b"\x80"])
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "invalid_request")
    assert "33 bytes" in error["message"]


def test_what_a_client_sends_cannot_forge_a_line_of_the_log(server, wire):
    name = 'x"}\n{"level": "info", "event": "forged"}\x1b[2J'
    wire.ask(HELLO, b"h", {"client": name})
    wire.generate(b"a", "secret prompt\n", 3)
    assert wire.collect(b"a")[2] == DONE
    lines = server.log_file.read_text()
    assert [line["name"] for line in server.events("hello")][-1] == name
    assert not server.events("forged") and "\x1b" not in lines
    assert "secret prompt" not in lines
    assert CHUNK  # chunks hold text; none of it is logged either
