"""The decoder against whatever bytes there are: a message or a refusal, never anything else."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.runtime.serving.messages import (
    CLIENT_TYPES,
    LIMITS,
    Cancel,
    Credit,
    Generate,
    GetStats,
    Hello,
    Ping,
    ProtocolError,
    decode_client,
    decode_server,
    encode,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=64)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from([*Generate.__struct_fields__, "chunks", "client", "unknown", ""])
bodies = st.dictionaries(names, values, max_size=6).map(msgpack.packb) | st.binary(max_size=200)
kinds = st.sampled_from([*CLIENT_TYPES, 0, 0x7F, 0x81, 0xFF])


def refused_or_decoded(decode, frames) -> object | None:
    try:
        request_id, message = decode(frames)
    except ProtocolError as error:
        assert error.error.code in ("invalid_request", "unsupported_version")
        assert 0 < len(error.error.message) < 2000
        # The refusal can itself be sent, whatever it was that is quoted in it.
        encode(error.error, error.request_id)
        return None
    assert request_id == frames[1]
    return message


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=6))
def test_any_frames_are_decoded_or_refused(frames):
    refused_or_decoded(decode_client, frames)
    refused_or_decoded(decode_server, frames)


@settings(max_examples=500, deadline=None)
@given(kinds, st.binary(max_size=40), bodies)
def test_any_body_is_decoded_or_refused(kind, request_id, body):
    frames = [bytes([1, kind]), request_id, body]
    message = refused_or_decoded(decode_client, frames)
    if message is not None:
        # What was taken is in range: sent on, it is taken again as the same.
        again = refused_or_decoded(decode_client, encode(message, request_id))
        assert again == message


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_valid_message_with_a_few_bytes_changed_is_decoded_or_refused(data):
    message = data.draw(
        st.sampled_from(
            [
                Generate(prompt="The film", max_tokens=9, stop=["END"], stream=True),
                Generate(prompt_token_ids=[1, 2, 3], logprobs=2, credit=7),
                Credit(chunks=5),
                Hello(client="x"),
            ]
        )
    )
    body = bytearray(encode(message, b"")[2])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for sent in (bytes(body), bytes(body[:cut])):
        refused_or_decoded(decode_client, [encode(message, b"")[0], b"id", sent])


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Generate,
        prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
        max_tokens=st.integers(1, 1_000_000),
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.none() | st.integers(0, 2**63 - 1),
        credit=st.integers(1, 1_000_000),
    )
    | st.builds(Credit, chunks=st.integers(1, 1_000_000))
    | st.builds(Hello, client=st.text(st.characters(exclude_categories=["Cs"]), max_size=128))
    | st.sampled_from([Cancel(), Ping(), GetStats()]),
    st.binary(max_size=32),
)
def test_what_is_encoded_is_decoded_as_it_was(message, request_id):
    assert decode_client(encode(message, request_id)) == (request_id, message)


@pytest.mark.parametrize("size", [0, 1])
def test_the_largest_body_is_the_limit(size):
    limit = int(LIMITS["message_bytes"].maximum)
    with pytest.raises(ProtocolError) as refused:
        decode_client([b"\x01\x02", b"", bytes(limit + size)])
    assert ("bytes: accepted are" in refused.value.error.message) == bool(size)
