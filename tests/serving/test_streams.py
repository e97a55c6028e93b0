"""What a client gets: its own tokens in order, text, log-probabilities, one last message."""

import asyncio
from contextlib import aclosing, closing

import pytest
from served_double import CONTEXT_TOKENS, PATIENT, answer
from wire import CHUNK, CREDIT, DONE, HELLO, PING, PONG, READY

from outrider.runtime.errors import UsageError
from outrider.runtime.request import GenerationRequest
from outrider.runtime.serving.client import AsyncClient
from outrider.runtime.serving.conversation import ServerError
from outrider.runtime.serving.messages import Chunk, Done


def request(prompt, num_tokens, **fields):
    return GenerationRequest(prompt=prompt, max_tokens=num_tokens, stream=True, **fields)


def test_hello_is_answered_with_what_is_served_and_its_limits(wire):
    kind, ready = wire.ask(HELLO, b"h", {"client": "a test"})
    assert kind == READY
    assert (ready["protocol"], ready["is_ready"], ready["state"]) == (1, True, "ready")
    assert ready["model"]["name"] == "double"
    assert ready["limits"]["context_tokens"] == CONTEXT_TOKENS
    assert ready["limits"]["message_bytes"] == 4 << 20


def test_a_stream_brings_its_tokens_in_numbered_chunks(wire):
    wire.generate(b"a", "some prompt", 9)
    seen = [wire.receive() for _ in range(10)]
    assert [kind for kind, _, _ in seen] == [CHUNK] * 9 + [DONE]
    assert [body["seq"] for _, _, body in seen[:-1]] == list(range(9))
    assert b"".join(bytes(body["token_ids"]) for _, _, body in seen[:-1]) == answer(
        "some prompt", 9
    )
    assert seen[-1][2]["finish_reason"] == "length"
    assert seen[-1][2]["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 9,
        "cached_tokens": 0,
    }
    assert seen[-1][2]["num_chunks"] == 9


def test_without_streaming_all_tokens_come_at_the_end(wire):
    wire.generate(b"a", "whole", 1500, stream=False, credit=2)
    seen = [wire.receive() for _ in range(3)]
    assert [kind for kind, _, _ in seen] == [CHUNK, CHUNK, DONE]
    assert [len(body["token_ids"]) for _, _, body in seen[:2]] == [1024, 476]
    tokens = b"".join(bytes(body["token_ids"]) for _, _, body in seen[:2])
    assert tokens == answer("whole", 1500)


def test_log_probabilities_come_with_the_text_of_each_token(wire):
    wire.generate(b"a", "p", 3, logprobs=2)
    chunks = [wire.receive()[2] for _ in range(3)]
    for chunk, token_id in zip(chunks, answer("p", 3), strict=True):
        (entry,) = chunk["logprobs"]
        assert entry["chosen"] == {"token_id": token_id, "text": chr(token_id), "logprob": -1.0}
        assert [one["token_id"] for one in entry["top"]] == [token_id, token_id + 1]
    assert wire.receive()[0] == DONE


def test_no_chunk_comes_without_credit_and_the_rest_comes_with_it(wire):
    wire.generate(b"a", "paused", 8, credit=3)
    for _ in range(3):
        assert wire.receive()[0] == CHUNK
    # Others run meanwhile: the pass goes on without the one that is paused.
    wire.generate(b"b", "another", 30)
    assert wire.collect(b"b")[0] == answer("another", 30)
    kind, pong = wire.ask(PING, b"a")
    assert (kind, pong["is_open"]) == (PONG, True)
    wire.send(CREDIT, b"a", {"chunks": 5})
    tokens, _, kind, body = wire.collect(b"a")
    assert (tokens, kind) == (answer("paused", 8)[3:], DONE)
    assert body["num_chunks"] == 8


def test_many_requests_of_one_client_do_not_mix(wire):
    prompts = {f"id{number}".encode(): f"prompt number {number}" for number in range(12)}
    for request_id, prompt in prompts.items():
        wire.generate(request_id, prompt, 5 + len(prompts) % 7)
    tokens = {request_id: b"" for request_id in prompts}
    ended = set()
    while len(ended) < len(prompts):
        kind, request_id, body = wire.receive()
        assert request_id not in ended
        if kind == CHUNK:
            tokens[request_id] += bytes(body["token_ids"])
        else:
            assert kind == DONE
            ended.add(request_id)
    assert tokens == {key: answer(prompt, 5 + 12 % 7) for key, prompt in prompts.items()}


def test_an_id_may_be_used_again_once_its_request_has_ended(wire):
    for number in range(3):
        wire.generate(b"same", f"turn {number}", 4)
        tokens, _, kind, _ = wire.collect(b"same")
        assert (tokens, kind) == (answer(f"turn {number}", 4), DONE)


def test_the_client_yields_chunks_and_done_last(client):
    items = list(client.generate(request("hello", 6)))
    assert [type(item) for item in items] == [Chunk] * 6 + [Done]
    assert "".join(item.text for item in items[:-1]) == answer("hello", 6).decode()


def test_a_long_stream_gets_its_credit_renewed(client):
    items = list(client.generate(request("long", 500)))
    assert b"".join(bytes(item.token_ids) for item in items[:-1]) == answer("long", 500)


def test_streams_of_one_client_may_be_taken_in_turns(client):
    first = client.generate(request("first", 20))
    second = client.generate(request("second", 20))
    tokens = {"first": b"", "second": b""}
    for one, two in zip(first, second, strict=True):
        if isinstance(one, Chunk):
            tokens["first"] += bytes(one.token_ids)
        if isinstance(two, Chunk):
            tokens["second"] += bytes(two.token_ids)
    assert tokens == {name: answer(name, 20) for name in tokens}


def test_leaving_a_stream_cancels_it(client):
    cancelled = client.stats().requests_total["cancelled"]
    with closing(client.generate(request("left", 4000))) as stream:
        assert next(stream).seq == 0
    for _ in range(2000):
        if client.stats().requests_total["cancelled"] > cancelled:
            break
    else:
        raise AssertionError("the request went on")


def test_a_refusal_is_raised_with_its_field(client):
    with pytest.raises(ServerError, match="context") as raised:
        list(client.generate(request("x" * CONTEXT_TOKENS, 1)))
    assert (raised.value.code, raised.value.exit_code) == ("invalid_request", 2)
    assert client.ready().is_ready


def test_a_request_too_large_to_send_is_refused_here(client):
    big = GenerationRequest(prompt_token_ids=[2**31 - 1] * (2**20), max_tokens=1)
    with pytest.raises(UsageError, match="accepted are 4,194,304"):
        client.generate(big)


def test_the_async_client_serves_many_tasks_at_once(server):
    async def run():
        async with AsyncClient(server.address, timeout_s=120, options=PATIENT) as client:
            assert (await client.ready()).model.name == "double"

            async def one(number):
                prompt = f"task {number}"
                items = [item async for item in client.generate(request(prompt, 30))]
                assert isinstance(items[-1], Done)
                tokens = b"".join(bytes(item.token_ids) for item in items[:-1])
                assert tokens == answer(prompt, 30)

            await asyncio.gather(*(one(number) for number in range(8)))
            async with aclosing(client.generate(request("left", 4000))) as stream:
                async for _ in stream:
                    break
            with pytest.raises(ServerError, match="context"):
                async for _ in client.generate(request("x" * CONTEXT_TOKENS, 1)):
                    pass
            for _ in range(2000):
                stats = await client.stats()
                if stats.requests_running == 0:
                    break
            return stats, await client.ping()

    stats, pong = asyncio.run(run())
    assert stats.requests_running == 0
    assert not pong.is_open
