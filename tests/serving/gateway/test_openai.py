"""The real `openai` client against the gateway: what it sends arrives, what it gets is typed."""

import openai
import pytest
from scripted_client import chunk, done, spoken
from served_gateway import PATIENCE_S

from outrider.runtime.serving.conversation import ServerError
from outrider.runtime.serving.messages import Candidate, Error, TokenLogprob


@pytest.fixture(scope="module")
def client(shared):
    with openai.OpenAI(
        base_url=f"{shared.url}/v1", api_key="unused", timeout=PATIENCE_S, max_retries=0
    ) as one:
        yield one


def test_a_completion_has_the_text_and_the_usage(gateway, client):
    gateway.upstream.script = lambda request: spoken("Once", " upon", finish_reason="length")
    reply = client.completions.create(model="nano", prompt="Say", max_tokens=2)
    assert reply.choices[0].text == "Once upon"
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 2)
    assert reply.usage.total_tokens == 7
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert reply.object == "text_completion" and reply.model == "nano"


def test_a_chat_has_the_text_and_the_usage(gateway, client):
    reply = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hi"}]
    )
    message = reply.choices[0].message
    assert (message.role, message.content) == ("assistant", "Hello you")
    assert reply.choices[0].finish_reason == "stop" and reply.object == "chat.completion"
    assert reply.usage.total_tokens == 7


def test_every_sampling_field_arrives(gateway, client):
    client.completions.create(
        model="nano",
        prompt="Say",
        max_tokens=3,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        stop=["x", "y"],
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "deadline_ms": 9000,
        },
    )
    (request,) = gateway.upstream.requests
    assert request.prompt == "Say" and not request.stream
    assert (request.max_tokens, request.temperature, request.top_p) == (3, 0.25, 0.5)
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -0.5)
    assert (request.seed, request.stop, request.top_k, request.min_p) == (11, ("x", "y"), 4, 0.125)
    assert (request.repetition_penalty, request.stop_token_ids) == (1.5, (3,))
    assert (request.ignore_eos, request.deadline_ms) == (True, 9000)


@pytest.mark.parametrize(
    ("prompt", "field", "value"),
    [
        pytest.param("text", "prompt", "text", id="text"),
        pytest.param(["text"], "prompt", "text", id="one-text"),
        pytest.param([1, 2], "prompt_token_ids", (1, 2), id="ids"),
        pytest.param([[1, 2]], "prompt_token_ids", (1, 2), id="one-list-of-ids"),
    ],
)
def test_a_prompt_may_be_text_or_ids(gateway, client, prompt, field, value):
    client.completions.create(model="nano", prompt=prompt)
    assert getattr(gateway.upstream.requests[0], field) == value


def test_a_conversation_arrives_turn_by_turn(gateway, client):
    client.chat.completions.create(
        model="nano",
        messages=[
            {"role": "developer", "content": "Be short."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c"},
        ],
        max_completion_tokens=7,
    )
    (request,) = gateway.upstream.requests
    turns = [(turn.role, turn.content) for turn in request.messages]
    assert turns == [("system", "Be short."), ("user", "ab"), ("assistant", "c")]
    assert request.max_tokens == 7


def test_a_stream_brings_each_chunk_as_it_comes(gateway, client):
    gateway.upstream.script = lambda request: spoken("a", "", "b\n\n", "ü")
    stream = client.completions.create(model="nano", prompt="Say", stream=True)
    parts = list(stream)
    assert [part.choices[0].text for part in parts] == ["a", "b\n\n", "ü", ""]
    assert [part.choices[0].finish_reason for part in parts] == [None, None, None, "stop"]
    assert len({part.id for part in parts}) == 1
    assert gateway.upstream.requests[0].stream


def test_a_chat_stream_begins_with_the_role(gateway, client):
    stream = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello you"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert all(part.usage is None for part in parts)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_stream_ends_with_the_usage_if_asked(gateway, client, kind):
    options = {"model": "nano", "stream": True, "stream_options": {"include_usage": True}}
    if kind == "chat":
        messages = [{"role": "user", "content": "Hi"}]
        parts = list(client.chat.completions.create(messages=messages, **options))
    else:
        parts = list(client.completions.create(prompt="Hi", **options))
    assert parts[-1].choices == [] and parts[-1].usage.total_tokens == 7
    assert all(part.usage is None for part in parts[:-1])
    assert parts[-2].choices[0].finish_reason == "stop"


def logprobs(text, value):
    chosen = Candidate(token_id=3, text=text, logprob=value)
    others = [Candidate(token_id=i, text="\ufffd", logprob=-i) for i in (3, 4)]
    return TokenLogprob(chosen=chosen, top=(chosen, *others))


def with_logprobs(request):
    return [
        chunk(0, "He", logprobs=(logprobs("He", -0.5),)),
        chunk(1, "llo", logprobs=(logprobs("llo", -0.25),)),
        done(2),
    ]


def test_log_probabilities_of_a_completion(gateway, client):
    gateway.upstream.script = with_logprobs
    reply = client.completions.create(model="nano", prompt="Say", logprobs=2)
    found = reply.choices[0].logprobs
    assert gateway.upstream.requests[0].logprobs == 2
    assert found.tokens == ["He", "llo"] and found.token_logprobs == [-0.5, -0.25]
    assert found.text_offset == [0, 2]
    # Two tokens that are no whole character look the same: the likelier one stands for both.
    assert list(found.top_logprobs[0].items()) == [("He", -0.5), ("\ufffd", -3.0)]


def test_log_probabilities_of_a_chat(gateway, client):
    gateway.upstream.script = with_logprobs
    reply = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
    )
    first = reply.choices[0].logprobs.content[0]
    assert gateway.upstream.requests[0].logprobs == 2
    assert (first.token, first.logprob, first.bytes) == ("He", -0.5, [72, 101])
    assert [one.token for one in first.top_logprobs] == ["He", "\ufffd", "\ufffd"]
    assert first.top_logprobs[1].bytes is None


def test_streamed_log_probabilities_stay_with_their_text(gateway, client):
    gateway.upstream.script = with_logprobs
    parts = list(client.completions.create(model="nano", prompt="S", logprobs=2, stream=True))
    assert [part.choices[0].logprobs.text_offset for part in parts[:2]] == [[0], [2]]
    assert parts[2].choices[0].logprobs is None


def test_the_models(gateway, client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("nano", "outrider")
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="nano"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("deadline_exceeded", 504, openai.InternalServerError),
        ("engine_dead", 503, openai.InternalServerError),
        ("expert_unavailable", 500, openai.InternalServerError),
        ("invalid_request", 400, openai.BadRequestError),
        ("overloaded", 429, openai.RateLimitError),
        ("shutting_down", 503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_server_has_its_status(gateway, client, code, status, kind, stream):
    error = Error(code=code, message="the reason", field="max_tokens", retry_after_ms=1500)
    gateway.upstream.script = lambda request: [ServerError(error)]
    with pytest.raises(kind) as raised:
        client.completions.create(model="nano", prompt="Say", stream=stream)
    assert raised.value.status_code == status
    assert (raised.value.code, raised.value.param) == (code, "max_tokens")
    assert raised.value.body["message"] == "the reason"
    assert raised.value.response.headers["retry-after"] == "2"


def test_a_failure_in_mid_stream_reaches_the_client(gateway, client):
    error = Error(code="expert_unavailable", message="the disk is gone")
    gateway.upstream.script = lambda request: [chunk(0, "a"), ServerError(error)]
    texts = []
    with pytest.raises(openai.APIError, match="the disk is gone"):
        for part in client.completions.create(model="nano", prompt="Say", stream=True):
            texts.append(part.choices[0].text)
    assert texts == ["a"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_server_cancelled_is_no_answer(gateway, client, stream):
    gateway.upstream.script = lambda request: spoken("a", finish_reason="cancelled")
    with pytest.raises(openai.APIError, match="cancelled"):
        list(client.completions.create(model="nano", prompt="Say", stream=stream))


def test_the_asynchronous_client_works_too(gateway):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="unused", timeout=PATIENCE_S
        ) as client:
            replies = await asyncio.gather(
                *(client.completions.create(model="nano", prompt=str(i)) for i in range(8))
            )
        return [reply.choices[0].text for reply in replies]

    assert asyncio.run(ask()) == ["Hello you"] * 8
    assert {request.prompt for request in gateway.upstream.requests} == set("01234567")
