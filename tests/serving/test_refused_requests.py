"""Requests that are out of bounds: refused with the field and the range, before anything runs."""

import math
import time

import pytest
from served_double import CONTEXT_TOKENS, ECHO, VOCAB_SIZE, answer
from wire import CHUNK, DONE, ERROR, GENERATE


def refusal(wire, **fields) -> dict:
    body = {"prompt": "p", "max_tokens": 1, "stream": True} | fields
    wire.send(GENERATE, b"a", {name: one for name, one in body.items() if one is not None})
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "invalid_request"), error
    return error


def test_a_prompt_beyond_the_context_is_refused_at_admission(wire):
    before = wire.stats()["expert_lookups_total"]["hit"]
    error = refusal(wire, prompt="x" * CONTEXT_TOKENS)
    assert error["field"] == "prompt" and f"the context {CONTEXT_TOKENS}" in error["message"]
    error = refusal(wire, prompt_token_ids=[1] * (CONTEXT_TOKENS + 1), prompt=None)
    assert error["field"] == "prompt"
    # Not a pass was run for them, and the longest that fits is served.
    assert wire.stats()["expert_lookups_total"]["hit"] == before
    wire.generate(b"b", "x" * (CONTEXT_TOKENS - 1), 1)
    assert wire.collect(b"b")[2] == DONE


@pytest.mark.parametrize(
    ("text", "problem"), [("", "empty"), ("x" * (2**20 + 1), "1048577 characters")]
)
def test_a_prompt_that_is_empty_or_endless_is_refused(wire, text, problem):
    error = refusal(wire, prompt=text)
    assert error["field"] == "prompt" and problem in error["message"]


def test_a_lone_surrogate_is_refused_as_bad_utf_8(wire):
    body = b"\x82\xa6prompt\xa3\xed\xa0\x80\xaamax_tokens\x01"
    wire.socket.send_multipart([bytes([1, GENERATE]), b"a", body])
    kind, _, error = wire.receive()
    assert (kind, error["code"]) == (ERROR, "invalid_request")


def test_nul_and_control_characters_are_characters(wire):
    wire.generate(b"a", "\0\x1b[31m\r\n", 5)
    assert wire.collect(b"a")[0] == answer("\0\x1b[31m\r\n", 5)


def test_a_megabyte_of_one_character_holds_up_nobody(wire):
    wire.send(GENERATE, b"big", {"prompt": "a" * 2**20, "max_tokens": 1, "stream": True})
    began = time.monotonic()
    wire.generate(b"a", "quick", 5)
    ended = {}
    while len(ended) < 2:
        kind, request_id, body = wire.receive()
        if kind != CHUNK:
            ended[request_id] = body
    assert ended[b"big"]["code"] == "invalid_request"
    assert ended[b"a"]["finish_reason"] == "length"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**31, 2**63, 1.5, "1", True])
def test_token_ids_outside_the_vocabulary_are_refused(wire, token_id):
    error = refusal(wire, prompt=None, prompt_token_ids=[1, token_id])
    assert error["field"] == "prompt_token_ids"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("top_k", 2**40),
        ("repetition_penalty", 0.0),
        ("logprobs", 10_000_000),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("stop", [""]),
        ("stop", ""),
        ("stop_token_ids", [1] * 65),
        ("seed", -1),
        ("deadline_ms", 0),
        ("credit", 0),
        ("max_tokens", 0),
        ("max_tokens", 2**62),
        ("max_tokens", CONTEXT_TOKENS),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(wire, field, value):
    error = refusal(wire, **{field: value})
    assert error["field"] == field
    assert "accepted" in error["message"]


def test_one_token_and_the_largest_values_are_served(wire):
    wire.generate(b"a", "one", 1, top_k=1_000_000, temperature=100.0, logprobs=20, seed=2**63 - 1)
    tokens, _, kind, body = wire.collect(b"a")
    assert (tokens, kind, body["finish_reason"]) == (answer("one", 1), DONE, "length")


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two END three", "END", "one two "),
        ("caf\u00e9 au lait", "\u00e9", "caf"),
        ("price: 5\u20ac or 6\u20ac", "\u20ac or", "price: 5"),
        ("aaab aaac", "aaac", "aaab "),
    ],
)
def test_no_part_of_a_stop_string_is_ever_sent(wire, text, stop, shown):
    # The double answers with one byte a token, so that a stop string comes over many chunks.
    num_tokens = len(text.encode())
    wire.generate(b"a", ECHO + text, num_tokens, stop=[stop])
    sent, kind = "", CHUNK
    while kind == CHUNK:
        kind, _, body = wire.receive()
        if kind == CHUNK:
            sent += body["text"]
            assert shown.startswith(sent)
    assert (sent, body["finish_reason"]) == (shown, "stop")
