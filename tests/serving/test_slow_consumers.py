"""Clients that read slowly or not at all: they pause themselves, then they are cut off."""

import psutil
import wire as by_hand
from served_double import answer
from wire import CHUNK, CREDIT, DONE, ERROR

SERVER = {"link": {"send_limit": 8}, "options": {"slow_consumer_s": 1.0}}


def test_a_slow_reader_pauses_its_own_stream_only(server, wire):
    wire.generate(b"slow", "read slowly", 6, credit=1)
    with by_hand.wire(server.address) as other:
        for place in range(6):
            kind, _, body = wire.receive()
            assert (kind, body["seq"]) == (CHUNK, place)
            other.generate(b"b", "fast", 50)
            assert other.collect(b"b")[0] == answer("fast", 50)
            wire.send(CREDIT, b"slow", {"chunks": 1})
    assert wire.receive()[0] == DONE


def test_a_reader_that_grants_nothing_is_cut_off(wire):
    wire.generate(b"a", "granting nothing", 50, credit=1)
    assert wire.receive()[0] == CHUNK
    _, _, kind, body = wire.collect(b"a")
    assert (kind, body["code"]) == (ERROR, "slow_consumer")
    assert "credit" in body["message"]


def test_a_client_that_reads_nothing_is_cut_off_in_bounded_memory(server, wire):
    before = psutil.Process(server.process.pid).memory_info().rss
    # It grants everything and reads nothing of eight streams with many candidates a chunk.
    with by_hand.wire(server.address, RCVHWM=8) as deaf:
        for number in range(8):
            deaf.generate(b"%d" % number, "wide", 8000, logprobs=20, credit=1_000_000)
        for _ in range(600):
            if wire.stats()["errors_total"].get("slow_consumer", 0) >= 8:
                break
            wire.generate(b"a", "bystander", 30)
            assert wire.collect(b"a")[0] == answer("bystander", 30)
            wire.socket.poll(50)
        else:
            raise AssertionError("it was never cut off")
        # Its last messages were kept for it.
        _, _, kind, body = deaf.collect(b"0")
        assert (kind, body["code"]) == (ERROR, "slow_consumer")
    assert server.events("client too slow")
    after = psutil.Process(server.process.pid).memory_info().rss
    assert after - before < 64 << 20
