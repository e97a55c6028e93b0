"""Requests: every field of INTERFACES section 2, its range, and FAULTS cases 17-21."""

import json
import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.runtime.errors import FieldError, UsageError
from outrider.runtime.limits import LIMITS
from outrider.runtime.request import (
    ChatMessage,
    GenerationRequest,
    SamplingParams,
    parse_request,
)

INF = math.inf
NAN = math.nan

# field -> (values accepted, values refused); written out by hand, not read from LIMITS.
RANGES = {
    "max_tokens": ([1, 128, 1_000_000], [0, -1, 1_000_001, 2**70, 1.0, True, "5", None]),
    "temperature": ([0, 0.0, 1e-300, 1, 100.0], [-1e-9, 100.5, NAN, INF, -INF, True, "1", 10**400]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.0001, NAN, INF, False, None]),
    "top_k": ([0, 1, 1_000_000], [-1, 1_000_001, 2**64, 0.5, False, NAN]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1, NAN, INF]),
    "presence_penalty": ([-2, 0.0, 2], [-2.1, 2.1, NAN, -INF]),
    "frequency_penalty": ([-2, 0.0, 2], [-2.1, 2.1, NAN, -INF]),
    "repetition_penalty": ([0.01, 1, 1.3, 100], [0, 0.0, -1, 100.1, NAN, INF, 5e-324]),
    "seed": ([None, 0, 2**63 - 1], [-1, 2**63, 1.5, True, "0"]),
    "stop": (
        [(), [], "x", ["x"], ["é" * 256], ["a"] * 16, None],
        [[""], "", ["a"] * 17, ["a" * 257], [1], [None], b"x", 5, ["\ud800"]],
    ),
    "stop_token_ids": (
        [(), [0], [5] * 64, [2**31 - 1]],
        [[-1], [2**31], [0] * 65, [True], [0.0], ["1"], "12", 3, {1: 2}],
    ),
    "ignore_eos": ([True, False], [0, 1, None, "true"]),
    "logprobs": ([None, 0, 20], [-1, 21, 0.5, True, False]),
}
CASES = [(field, value) for field, (good, _) in RANGES.items() for value in good]
BAD_CASES = [(field, value) for field, (_, bad) in RANGES.items() for value in bad]


def ids(case):
    text = f"{case!r}"
    return text if len(text) < 40 else f"{text[:37]}..."


def test_every_sampling_field_has_a_range_case():
    assert set(RANGES) == set(SamplingParams.__struct_fields__)


def test_request_fields_are_those_of_the_interface():
    assert set(GenerationRequest.__struct_fields__) == {
        *("prompt", "messages", "prompt_token_ids", "max_tokens", "temperature", "top_p", "top_k"),
        *("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop"),
        *("stop_token_ids", "ignore_eos", "logprobs", "stream", "deadline_ms"),
    }


def test_defaults_change_nothing():
    params = SamplingParams()
    assert json.loads(msgspec.json.encode(params)) == {
        "max_tokens": 128,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "logprobs": None,
    }


@pytest.mark.parametrize(("field", "value"), CASES, ids=ids)
def test_value_in_range_is_accepted(field, value):
    SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD_CASES, ids=ids)
def test_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert field in message
    assert message[0].islower()
    assert len(message) < 500


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "max_tokens", "logprobs"])
def test_refusal_names_value_and_both_bounds(field):
    with pytest.raises(FieldError) as caught:
        SamplingParams(**{field: -7})
    message = str(caught.value)
    assert "-7" in message
    assert f"{LIMITS[field].minimum:,}" in message
    assert f"{LIMITS[field].maximum:,}" in message


def test_values_become_plain_and_immutable():
    ints = np.array([3, 4])
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(4), stop="x", stop_token_ids=list(ints)
    )
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert params.stop_strings == params.stop == ("x",)
    assert params.stop_token_ids == (3, 4)
    assert hash(params) == hash(
        SamplingParams(temperature=0.5, top_k=4, stop=["x"], stop_token_ids=(3, 4))
    )
    with pytest.raises(AttributeError):
        params.top_k = 5
    request = GenerationRequest(prompt_token_ids=ints)
    assert request.prompt_token_ids == (3, 4)


def test_greedy_is_temperature_zero_only():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-300).is_greedy


PROMPTS = {
    "prompt": "x",
    "messages": [ChatMessage(role="user", content="x")],
    "prompt_token_ids": [1],
}


@pytest.mark.parametrize("given_kinds", [[], ["prompt", "messages"], list(PROMPTS)], ids=str)
def test_exactly_one_prompt_is_accepted(given_kinds):
    with pytest.raises(FieldError, match="exactly one of"):
        GenerationRequest(**{kind: PROMPTS[kind] for kind in given_kinds})
    for kind, value in PROMPTS.items():
        GenerationRequest(**{kind: value})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * (2**20 + 1)}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids"),
        ({"prompt_token_ids": {1, 2}}, "prompt_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [ChatMessage(role="user", content="")]}, "messages"),
        ({"messages": [ChatMessage(role="user", content="a" * 2**20)] * 2}, "messages"),
        ({"prompt": "x", "deadline_ms": 0}, "deadline_ms"),
        ({"prompt": "x", "deadline_ms": 86_400_001}, "deadline_ms"),
        ({"prompt": "x", "stream": 1}, "stream"),
    ],
    ids=ids,
)
def test_bad_request_is_refused_by_name(fields, field):
    with pytest.raises(FieldError) as caught:
        GenerationRequest(**fields)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500


def test_odd_but_real_text_is_accepted():
    for prompt in ["\0", " ", "\n", "e\u0301", "😀", "\ufffd", "a" * 2**20]:
        assert GenerationRequest(prompt=prompt).prompt == prompt


def test_message_with_unknown_role_or_surrogate_is_refused():
    with pytest.raises(FieldError, match=r"role is 'root'.*system, user, assistant, tool"):
        ChatMessage(role="root", content="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FieldError, match="lone surrogate"):
        ChatMessage(role="user", content="ab\udfff")


def test_from_params_keeps_every_value():
    params = SamplingParams(temperature=0.3, top_k=7, seed=9, stop=("a", "b"), logprobs=3)
    request = GenerationRequest.from_params(params, prompt="x", deadline_ms=50, stream=True)
    for name in SamplingParams.__struct_fields__:
        assert getattr(request, name) == getattr(params, name)
    assert (request.prompt, request.deadline_ms, request.stream) == ("x", 50, True)


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "accepted"),
    [
        ([0, 99], 8, True),
        ([0] * 2, 98, True),
        ([0] * 2, 99, False),
        ([0] * 99, 1, True),
        ([0] * 100, 1, False),
        ([0] * 5000, 1, False),
        ([100], 1, False),
        ([-1], 1, False),
        ([], 1, False),
        ([True], 1, False),
        ([1.0], 1, False),
    ],
    ids=lambda value: ids(value),
)
def test_tokens_are_checked_against_the_model(prompt_ids, max_tokens, accepted):
    request = GenerationRequest(prompt="x", max_tokens=max_tokens)
    if accepted:
        request.validate_against(100, 100, prompt_token_ids=prompt_ids)
        return
    with pytest.raises(FieldError):
        request.validate_against(100, 100, prompt_token_ids=prompt_ids)


def test_context_refusal_names_the_numbers():
    request = GenerationRequest(prompt_token_ids=[1] * 40, max_tokens=61)
    with pytest.raises(FieldError) as caught:
        request.validate_against(100, 100)
    assert caught.value.field == "max_tokens"
    for number in ("61", "40", "101", "100", "60"):
        assert number in str(caught.value)
    request.validate_against(100, 101)
    with pytest.raises(FieldError) as caught:
        request.validate_against(100, 30)
    assert caught.value.field == "prompt"
    assert "40" in str(caught.value)
    assert "30" in str(caught.value)


def test_stop_token_beyond_the_vocabulary_is_refused():
    request = GenerationRequest(prompt_token_ids=[1], stop_token_ids=[100])
    with pytest.raises(FieldError) as caught:
        request.validate_against(100, 500)
    assert caught.value.field == "stop_token_ids"
    request.validate_against(101, 500)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "temperature": NAN}, "temperature"),
        ({"prompt": "x", "temperature": 10**400}, "temperature"),
        ({"prompt": "x", "top_k": True}, "top_k"),
        ({"prompt": "x", "top_k": "5"}, "top_k"),
        ({"prompt": "x", "n": 4}, "n"),
        ({"prompt": "x", "max_new_tokens": 4}, "max_new_tokens"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt_token_ids": [1, "2"]}, "prompt_token_ids"),
    ],
    ids=ids,
)
def test_untyped_fields_are_refused_by_name(fields, field):
    with pytest.raises(FieldError) as caught:
        parse_request(fields)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_surrogates_where_no_text_belongs_are_a_usage_error():
    for fields in ({"max_tokens": "\ud800"}, {"prompt": "x", "\udfff": 1}):
        with pytest.raises(UsageError) as caught:
            parse_request(fields)
        str(caught.value).encode()


def test_untyped_fields_make_the_same_request():
    fields = {"messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "temperature": 1}
    made = GenerationRequest(
        messages=[ChatMessage(role="user", content="hi")], stop="a", temperature=1.0
    )
    assert parse_request(fields) == made
    assert parse_request({"prompt": "x", "stop": "a"}).stop == ("a",)


TEXT = st.text("a\0é😀\ud800", max_size=4)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(), TEXT, st.none()), max_size=3),
    st.dictionaries(TEXT, st.integers(), max_size=2),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from((*GenerationRequest.__struct_fields__, "n", "")), VALUES, max_size=5
    )
)
def test_any_fields_make_a_sound_request_or_a_usage_error(fields):
    try:
        request = parse_request(fields)
    except UsageError:
        return
    assert (request.prompt, request.messages, request.prompt_token_ids).count(None) == 2
    assert 0 <= request.temperature <= 100
    assert 0 < request.top_p <= 1
    assert 1 <= request.max_tokens <= 1_000_000
    assert all(request.stop_strings)
    # Whatever was accepted survives the wire unchanged.
    wire = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(wire, type=GenerationRequest) == request
    json.loads(msgspec.json.encode(request))


def test_typed_decode_gives_the_field_to_the_server():
    decoder = msgspec.msgpack.Decoder(GenerationRequest)
    with pytest.raises(msgspec.ValidationError) as caught:
        decoder.decode(msgspec.msgpack.encode({"prompt": "x", "min_p": 2}))
    assert isinstance(caught.value.__cause__, FieldError)
    assert caught.value.__cause__.field == "min_p"


def test_text_side_of_the_runtime_does_not_load_torch():
    modules = ("request", "limits", "stats", "sizes", "config", "provenance", "detokenizer")
    program = "import sys\n" + "".join(f"import outrider.runtime.{name}\n" for name in modules)
    program += "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
