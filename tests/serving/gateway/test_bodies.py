"""Bodies that are refused, each with its status and the name of the field at fault."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_gateway import exchange, run_gateway

from outrider.runtime.serving.gateway.bodies import parse_chat, parse_completion
from outrider.runtime.serving.gateway.generation import Settings
from outrider.runtime.serving.gateway.refusal import Refusal

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURN = {"role": "user", "content": "Hi"}


def post(gateway, path, content, **headers):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    headers = {"content-type": "application/json", **headers}
    return gateway.http.post(path, content=content, headers=headers)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"model": 5}, "model"),
        ({"unknown": 1}, "unknown"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_field_that_cannot_be_is_named(gateway, path, changes, field):
    own = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [TURN]}
    reply = post(gateway, path, own | changes)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert error["type"] == "invalid_request_error"
    assert field.split(".")[-1].split("[")[0] in error["message"]
    assert not gateway.upstream.requests


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": "Hi", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "Hi", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": "Hi", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "Hi", "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": "Hi", "suffix": "!"}, "suffix"),
        (COMPLETIONS, {"prompt": "Hi", "messages": [TURN]}, "messages"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [TURN, {"role": "user"}]}, "messages[1].content"),
        (CHAT, {"messages": [{"role": "root", "content": "Hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [TURN | {"tool_calls": []}]}, "messages[0].tool_calls"),
        (CHAT, {"messages": [TURN], "tools": [{}]}, "tools"),
        (CHAT, {"messages": [TURN], "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": [TURN], "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": [TURN], "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        (CHAT, {"messages": [TURN], "max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"messages": [TURN], "max_completion_tokens": 1, "max_tokens": 1}, "max_tokens"),
        (CHAT, {"messages": [TURN], "prompt": "Hi"}, "prompt"),
    ],
)
def test_a_field_of_one_kind_is_named(gateway, path, body, field):
    reply = post(gateway, path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b'{"prompt": "Hi"} x', id="trailing"),
        pytest.param(b'{"prompt": "\xff"}', id="no-utf-8"),
        pytest.param(b'{"prompt": "\\ud800"}', id="lone-surrogate"),
        pytest.param(b'{"prompt": "Hi", "temperature": NaN}', id="nan"),
        pytest.param(b'{"prompt": "Hi", "temperature": 1e999}', id="too-large-a-number"),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b'{"logit_bias":' * 100_000, id="deep-objects"),
        pytest.param(b'{"metadata":' + b"[" * 100_000, id="deep-anything"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\x82\xa6prompt\xa2Hi", id="msgpack"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_no_json_object_is_refused(gateway, path, raw):
    reply = post(gateway, path, raw)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert post(gateway, COMPLETIONS, {"prompt": "Hi"}).status_code == 200


@given(raw=st.one_of(st.binary(), st.text().map(str.encode)))
def test_no_bytes_do_more_than_be_refused(raw):
    for parse in (parse_completion, parse_chat):
        with pytest.raises(Refusal) as raised:
            parse(raw)
        assert raised.value.status == 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["prompt", "messages", "max_tokens", "stop", "n", "stream", "logprobs", "seed", "echo"]


@given(body=st.dictionaries(st.sampled_from(FIELDS), VALUES))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_value_does_more_than_be_refused(body):
    raw = json.dumps(body).encode()
    for parse, field in ((parse_completion, "prompt"), (parse_chat, "messages")):
        try:
            asked = parse(raw)
        except Refusal as refusal:
            assert refusal.status == 400
        else:
            assert body[field] and asked.is_stream is bool(body.get("stream"))


@pytest.mark.parametrize(
    "media_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_read(gateway, media_type):
    # What another site's page can send without being asked for leave is none of these' business.
    reply = post(gateway, COMPLETIONS, {"prompt": "Hi"}, **{"content-type": media_type})
    assert reply.status_code == 415
    assert not gateway.upstream.requests


def test_json_may_name_its_charset(gateway):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert post(gateway, COMPLETIONS, {"prompt": "Hi"}, **headers).status_code == 200


def test_another_model_is_not_found(gateway):
    reply = post(gateway, COMPLETIONS, {"prompt": "Hi", "model": "gpt-4"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/..%2fapp.py", 404),
        ("GET", "/static/", 404),
        ("GET", "/admin", 404),
    ],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(gateway, method, path, status):
    reply = gateway.http.request(method, path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def small():
    with run_gateway(settings=Settings(max_body_bytes=1000, body_timeout_s=0.5)) as gateway:
        yield gateway


def body_of(size):
    raw = json.dumps({"prompt": ""}).encode()
    return raw[:-2] + b"x" * (size - len(raw)) + raw[-2:]


def test_a_body_at_the_limit_is_read_and_one_above_is_not(small):
    assert post(small, COMPLETIONS, body_of(1000)).status_code == 200
    reply = post(small, COMPLETIONS, body_of(1001))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_without_a_length_is_counted(small):
    def parts():
        for _ in range(20):
            yield b"x" * 100

    headers = {"content-type": "application/json"}
    reply = small.http.post(COMPLETIONS, content=parts(), headers=headers)
    assert reply.status_code == 413


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        pytest.param(b"Content-Length: 500\r\n\r\n{", 408, id="never-arrives"),
        pytest.param(b"Content-Length: 99999999999999999999\r\n\r\n", 413, id="huge-length"),
        pytest.param(b"Content-Length: -1\r\n\r\n", 400, id="negative-length"),
        pytest.param(b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, id="two-lengths"),
        pytest.param(b"X: " + b"x" * 400_000, 400, id="huge-header"),
        pytest.param(b"\x16\x03\x01\r\n\r\n", 400, id="tls"),
    ],
)
def test_a_request_that_lies_is_ended(small, rest, status):
    assert exchange(small.port, HEAD + rest)[0] == status
