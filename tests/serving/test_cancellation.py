"""Requests that are cancelled, and requests and clients that go by the same name."""

import wire as by_hand
from served_double import answer
from wire import CANCEL, CHUNK, DONE, ERROR, GENERATE, HELLO, PING, PONG, READY


def test_cancel_ends_a_stream_within_a_pass(wire):
    wire.generate(b"a", "slow one", 4000)
    for _ in range(2):
        assert wire.receive()[0] == CHUNK
    wire.send(CANCEL, b"a")
    tokens, _, kind, body = wire.collect(b"a")
    assert (kind, body["finish_reason"]) == (DONE, "cancelled")
    # The pass that ran when the message came, and one more for the time it was under way.
    assert body["usage"]["completion_tokens"] <= 4
    assert 2 + len(tokens) == body["usage"]["completion_tokens"] == body["num_chunks"]
    stats = wire.settle()
    assert stats["expert_cache_bytes"] == 0


def test_cancel_while_waiting_ends_a_request_that_never_ran(wire):
    for number in range(4):
        wire.generate(b"running%d" % number, f"slow {number}", 4000)
        assert wire.receive()[0] == CHUNK
    wire.generate(b"waiting", "later", 4000)
    wire.send(CANCEL, b"waiting")
    tokens, _, kind, body = wire.collect(b"waiting")
    assert (tokens, kind, body["finish_reason"]) == (b"", DONE, "cancelled")
    for number in range(4):
        wire.send(CANCEL, b"running%d" % number)


def test_cancel_of_nothing_is_answered_and_changes_nothing(wire):
    for request_id in (b"never", b"", b"\0" * 32):
        kind, pong = wire.ask(CANCEL, request_id or b"\1")
        assert (kind, pong["is_open"]) == (PONG, False)
    wire.generate(b"done", "short", 2)
    assert wire.collect(b"done")[2] == DONE
    assert wire.ask(CANCEL, b"done")[0] == PONG


def test_cancel_never_touches_another_clients_request(server, wire):
    wire.generate(b"a", "mine", 300)
    assert wire.receive()[0] == CHUNK
    with by_hand.wire(server.address) as other:
        kind, pong = other.ask(CANCEL, b"a")
        assert (kind, pong["is_open"]) == (PONG, False)
        other.generate(b"a", "theirs", 20)
        assert other.collect(b"a")[0] == answer("theirs", 20)
    tokens, _, kind, _ = wire.collect(b"a")
    assert (tokens, kind) == (answer("mine", 300)[1:], DONE)


def test_cancel_racing_the_last_token_gives_one_last_message(wire):
    endings = {"length": 0, "cancelled": 0}
    for number in range(40):
        request_id = b"%d" % number
        num_tokens = 2 + number % 5
        wire.generate(request_id, f"race {number}", num_tokens)
        num_chunks = num_last = 0
        while num_chunks < num_tokens - 1:
            kind, _, _ = wire.receive()
            assert kind == CHUNK
            num_chunks += 1
        wire.send(CANCEL, request_id)
        # Answers come in order, so once this one is there nothing of the request can follow.
        wire.send(PING, b"end")
        while True:
            kind, answered, body = wire.receive()
            if answered == b"end":
                if num_last:
                    break
                wire.send(PING, b"end")
            elif kind in (DONE, ERROR):
                num_last += 1
                endings[body["finish_reason"]] += 1
        assert num_last == 1
    assert sum(endings.values()) == 40


def test_a_second_request_with_an_open_id_is_refused_and_the_first_goes_on(wire):
    wire.generate(b"same", "the first", 400)
    assert wire.receive()[0] == CHUNK
    wire.generate(b"same", "the second", 5)
    tokens, refusal = answer("the first", 400)[:1], None
    while True:
        kind, _, body = wire.receive()
        if kind == CHUNK:
            tokens += bytes(body["token_ids"])
        elif kind == ERROR:
            assert refusal is None
            refusal = body
        else:
            break
    assert refusal is not None and refusal["code"] == "duplicate_id"
    assert (tokens, kind) == (answer("the first", 400), DONE)


def test_a_second_client_with_a_live_identity_is_ignored(server):
    with by_hand.wire(server.address, identity=b"one name") as first:
        assert first.ask(HELLO)[0] == READY
        first.generate(b"a", "the first", 500)
        assert first.receive()[0] == CHUNK
        with by_hand.wire(server.address, identity=b"one name") as second:
            second.send(HELLO, b"h")
            second.send(GENERATE, b"b", {"prompt": "the second", "max_tokens": 3})
            second.send(CANCEL, b"a")
            assert second.socket.poll(1000) == 0
        tokens, _, kind, _ = first.collect(b"a")
        assert (tokens, kind) == (answer("the first", 500)[1:], DONE)
