"""outrider-nano's tokenizer gives every text back, and keeps digits apart."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from recipes.nano import tokenizer as nano

TEXTS = [
    "In 1984 there were 365 days.",
    "def f(x):\n    return x + 1\n",
    "naïve café, déjà vu",
] * 30
learned = nano.learn(TEXTS, vocab_size=320)


@given(st.text())
def test_decoding_gives_any_text_back(text: str) -> None:
    if nano.END_OF_TEXT not in text:
        assert learned.decode(learned.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t  x",
        "👩‍👩‍👧‍👦 🇩🇪 e\u0301",
        "日本語 और हिन्दी",
        "\x00\x7f\ufeff",
        "a  b   c",
        "1234567890",
    ],
)
def test_a_loaded_tokenizer_gives_text_back(tmp_path: Path, text: str) -> None:
    nano.save(learned, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token == nano.END_OF_TEXT and loaded.eos_token_id == 0


@given(st.integers(min_value=0))
def test_each_digit_is_a_token(number: int) -> None:
    assert learned.encode(str(number)).tokens == list(str(number))


def test_the_alphabet_has_all_bytes_and_the_merges_are_learned() -> None:
    tokens = set(learned.get_vocab())
    assert sum(len(token) == 1 for token in tokens) == 256
    assert any(len(token) > 2 for token in tokens - {nano.END_OF_TEXT})


def test_encoded_documents_end_with_the_end_of_text() -> None:
    stream = nano.encode(learned, ["one", "two"])
    ends = [index for index, token in enumerate(stream) if token == 0]
    assert len(ends) == 2 and ends[-1] == len(stream) - 1
    assert learned.decode(stream[: ends[0]].tolist()) == "one"
