"""From prompts to token ids: which kind it is, what is checked before, what the tokenizer adds."""

import time
from pathlib import Path

import families
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.runtime.errors import FieldError, UsageError
from outrider.runtime.models.loading import load_tokenizer
from outrider.runtime.prompt import encode, encode_text, is_one, request_of
from outrider.runtime.request import ChatMessage, SamplingParams

PARAMS = SamplingParams(max_tokens=3, temperature=0.5, stop=["x"])
MESSAGES = [ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="hi")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    families.save_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        pytest.param("text", True, id="text"),
        pytest.param("", True, id="empty-text"),
        pytest.param([1, 2], True, id="ids"),
        pytest.param((1,), True, id="tuple-of-ids"),
        pytest.param(np.array([1, 2]), True, id="array"),
        pytest.param([np.int32(1)], True, id="numpy-ids"),
        pytest.param(MESSAGES, True, id="messages"),
        pytest.param(["a", "b"], False, id="texts"),
        pytest.param([[1], [2]], False, id="lists-of-ids"),
        pytest.param([MESSAGES, MESSAGES], False, id="chats"),
        pytest.param([], False, id="nothing"),
        pytest.param(iter(["a"]), False, id="iterator"),
        pytest.param({"a": 1}.keys(), False, id="view"),
    ],
)
def test_one_prompt_is_told_from_several(prompts, expected):
    assert is_one(prompts) is expected


def test_asking_does_not_use_up_an_iterator():
    texts = iter(["a", "b"])
    assert not is_one(texts)
    assert list(texts) == ["a", "b"]


def test_a_request_carries_the_prompt_and_the_parameters():
    for prompt, kind in (("hi", "prompt"), (MESSAGES, "messages"), ([1, 2], "prompt_token_ids")):
        request = request_of(prompt, PARAMS)
        given = {
            name: getattr(request, name) for name in ("prompt", "messages", "prompt_token_ids")
        }
        assert [name for name, value in given.items() if value is not None] == [kind]
        assert list(given[kind]) == list(prompt)
        for name in SamplingParams.__struct_fields__:
            assert getattr(request, name) == getattr(PARAMS, name)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        pytest.param("", "prompt is empty", id="empty"),
        pytest.param([], "prompt_token_ids is empty", id="no-ids"),
        pytest.param("x" * (2**20 + 1), "1048577 characters", id="too-long"),
        pytest.param([1] * (2**20 + 1), "1048577 token ids", id="too-many"),
        pytest.param("\ud800", "surrogate", id="surrogate"),
        pytest.param([-1], r"\[0\] is -1", id="negative"),
        pytest.param([2**31], r"\[0\] is 2147483648", id="beyond-int32"),
        pytest.param([1.0], r"\[0\] is 1.0", id="float"),
        pytest.param([ChatMessage(role="user", content="x" * 2**21)], "characters", id="long-chat"),
    ],
)
def test_what_is_out_of_bounds_is_refused_without_a_tokenizer(prompt, message):
    with pytest.raises(FieldError, match=message):
        request_of(prompt, PARAMS)


@given(text=st.text(min_size=1, max_size=50))
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    ids = encode(tokenizer, request_of(text, PARAMS))
    assert ids == encode_text(tokenizer, text)
    assert all(type(token_id) is int for token_id in ids)
    if "<|endoftext|>" not in text:
        assert tokenizer.decode(ids) == text


def test_ids_are_taken_as_they_are(tokenizer):
    assert encode(tokenizer, request_of(np.array([3, 1, 2]), PARAMS)) == [3, 1, 2]


def test_special_tokens_are_those_that_the_tokenizer_adds(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    families.save_tokenizer(tmp_path)
    adding = load_tokenizer(tmp_path)
    adding._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = encode(tokenizer, request_of("film", PARAMS))
    assert encode(adding, request_of("film", PARAMS)) == [0, *plain]


def test_messages_go_through_the_template_with_room_for_the_answer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        ids = encode(tokenizer, request_of(MESSAGES, PARAMS))
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids) == "[system]be brief[user]hi[assistant]"


def test_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(UsageError, match="no chat template; give a plain prompt"):
        encode(tokenizer, request_of(MESSAGES, PARAMS))


def test_a_megabyte_of_one_character_is_tokenised_in_bounded_time(tokenizer):
    began = time.monotonic()
    ids = encode(tokenizer, request_of("a" * 2**20, PARAMS))
    assert tokenizer.decode(ids[:4]) == "aaaa"[: len(tokenizer.decode(ids[:4]))]
    assert time.monotonic() - began < 60
