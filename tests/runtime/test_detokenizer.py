"""Streaming text: equal to decoding at once, whole characters, no part of a stop, bounded cost."""

from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from outrider.runtime.detokenizer import Detokenizer

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CORPUS = [
    "the film was a quiet one, and the one that the town had waited for",
    "żółć naïve café résumé Straße ελληνικά русский текст 日本語の文章 한국어 😀👩‍👩‍👧 ≠ €",
    "a stop, another stop\n\nUser: hello\nAssistant: hi </s> <|end|> ababab aabaab",
]


def byte_level_tokenizer() -> Tokenizer:
    """Every byte is a token, the merges are trained, and one token is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As sentencepiece models have it: a space is `▁`, what is not in the vocabulary is bytes."""
    words = ["▁", "▁the", "▁film", "a", "b", "▁a", "the", "."]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTES = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()
EOS = BYTES.token_to_id("<eos>")


def byte_ids(data: bytes) -> list[int]:
    """One token a byte. The byte alphabet moves the bytes that do not print up behind 255."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(moved)}
    return [BYTES.token_to_id(letters[byte]) for byte in data]


def decode(ids: list[int]) -> str:
    return BYTES.decode(ids, skip_special_tokens=True)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """What each push and the finish returned; stops pushing where generation would stop."""
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()]


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, by brute force: read on until some stop is complete, cut the longest one."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def test_byte_helper_spells_text():
    text = "aé€😀\n\0"
    assert decode(byte_ids(text.encode())) == text


@relaxed
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=60))
def test_any_tokens_give_the_text_of_decoding_at_once(ids):
    detokenizer = Detokenizer(BYTES)
    pieces = stream(detokenizer, ids)
    assert "".join(pieces) == detokenizer.text == decode(ids)
    assert not detokenizer.stopped


@settings(relaxed, max_examples=150)
@given(
    st.lists(st.sampled_from([*byte_ids("é€😀".encode()), *byte_ids(b"\x80a"), EOS]), max_size=80)
)
def test_special_tokens_inside_a_character_change_nothing(ids):
    detokenizer = Detokenizer(BYTES)
    assert "".join(stream(detokenizer, ids)) == detokenizer.text == decode(ids)


@relaxed
@given(st.binary(max_size=60))
def test_any_bytes_one_a_token_give_the_text_of_decoding_at_once(data):
    pieces = stream(Detokenizer(BYTES), byte_ids(data))
    assert "".join(pieces) == data.decode(errors="replace")


@relaxed
@given(st.lists(st.sampled_from("aé€😀한👩‍\n\ufffd"), max_size=20).map("".join))
def test_characters_come_out_whole_and_as_soon_as_they_are(text):
    detokenizer = Detokenizer(BYTES)
    data = text.encode()
    seen = ""
    for end, token_id in enumerate(byte_ids(data), start=1):
        seen += detokenizer.push(token_id)
        whole = data[:end].decode(errors="ignore")
        assert whole.startswith(seen)
        # Only a real replacement character looks like an unfinished one and has to wait.
        if not whole.endswith("\ufffd") and data[:end].decode(errors="replace") == whole:
            assert seen == whole
    assert seen + detokenizer.finish() == text


def test_bytes_that_are_no_character_come_out_at_the_end():
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(token_id) for token_id in byte_ids(b"a\xe2\x82")] == ["a", "", ""]
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    with pytest.raises(ValueError, match="after finish"):
        detokenizer.push(1)


def test_bytes_that_are_no_character_do_not_hold_back_the_rest_for_ever():
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token_id) for token_id in byte_ids(b"\x80" * 50)]
    assert len("".join(pieces)) >= 40
    assert "".join(pieces) + detokenizer.finish() == "\ufffd" * 50


# Small alphabets, so that stops occur, overlap, and begin without being completed.
stop_text = st.lists(st.sampled_from("aab€😀"), min_size=1, max_size=4).map("".join)
stop_lists = st.lists(stop_text, min_size=1, max_size=4)
long_text = st.lists(st.sampled_from("aabb€😀"), max_size=24).map("".join)


@st.composite
def tokenised(draw: st.DrawFn) -> list[int]:
    """A text with token borders anywhere: some of it in trained tokens, some of it in bytes."""
    ids: list[int] = []
    for part in draw(st.lists(long_text, max_size=4)):
        if draw(st.booleans()):
            ids += byte_ids(part.encode())
        else:
            ids += BYTES.encode(part).ids
    return ids


@settings(relaxed, max_examples=250)
@given(tokenised(), stop_lists)
def test_text_ends_in_front_of_the_first_stop(ids, stops):
    detokenizer = Detokenizer(BYTES, stop=stops)
    pieces = stream(detokenizer, ids)
    text, stopped = cut_at_first_stop(decode(ids), stops)
    assert "".join(pieces) == detokenizer.text == text
    assert detokenizer.stopped == stopped


@settings(relaxed, max_examples=150)
@given(long_text, stop_lists)
def test_text_that_can_become_no_stop_is_not_held_back(text, stops):
    detokenizer = Detokenizer(BYTES, stop=stops)
    sent = ""
    for end, character in enumerate(text, start=1):
        for token_id in byte_ids(character.encode()):
            sent += detokenizer.push(token_id)
        if detokenizer.stopped:
            return
        so_far = text[:end]
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        longest = max((len(b) for b in beginnings if so_far.endswith(b)), default=0)
        assert sent == so_far[: len(so_far) - longest]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab STOP cd", ["STOP"], "ab "),
        ("ab STO", ["STOP"], "ab STO"),
        ("ab STOSTOP", ["STOP"], "ab STO"),
        ("aaab", ["aab"], "a"),
        ("xabcd", ["bc", "abcd"], "xa"),
        ("xabcd", ["cd", "abcd"], "x"),
        ("abab", ["ab", "b"], ""),
        ("prix: 5€ net", ["€"], "prix: 5"),
        ("hi 👩‍👩‍👧!", ["👩‍👧"], "hi 👩‍"),
        ("line\n\nUser: x", ["\nUser:", "\n\nUser:"], "line"),
        ("none", ["absent"], "none"),
    ],
    ids=[
        *("plain", "unfinished", "restarted", "self-overlap", "first-complete", "longest"),
        *("at-start", "multi-byte", "grapheme", "newlines", "absent"),
    ],
)
@pytest.mark.parametrize("borders", ["bytes", "trained"])
def test_stop_strings(text, stops, expected, borders):
    ids = byte_ids(text.encode()) if borders == "bytes" else BYTES.encode(text).ids
    detokenizer = Detokenizer(BYTES, stop=stops)
    assert "".join(stream(detokenizer, ids)) == expected
    assert detokenizer.stopped == (expected != text)


def test_stop_inside_a_held_end_is_found_at_the_finish():
    detokenizer = Detokenizer(BYTES, stop=["\ufffd"])
    assert "".join(stream(detokenizer, byte_ids(b"ab\xe2"))) == "ab"
    assert detokenizer.stopped


def test_nothing_comes_after_a_stop():
    detokenizer = Detokenizer(BYTES, stop="b")
    assert [detokenizer.push(token_id) for token_id in byte_ids(b"abcd")] == ["a", "", "", ""]
    assert detokenizer.finish() == ""
    assert detokenizer.text == "a"


def test_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(BYTES, stop=["a", ""])


def test_special_tokens_are_left_out_or_shown():
    ids = [*byte_ids(b"a"), EOS, *byte_ids("é".encode())]
    assert "".join(stream(Detokenizer(BYTES), ids)) == "aé"
    shown = Detokenizer(BYTES, skip_special_tokens=False)
    assert "".join(stream(shown, ids)) == "a<eos>é"


class CountingTokenizer:
    """Counts the ids that are decoded, which is what a quadratic re-decode would show in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_ids = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_ids += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


STREAMS = {
    "text": BYTES.encode("the film was a quiet one ").ids * 40,
    "bytes": byte_ids("日本😀".encode()) * 100,
    "invalid": byte_ids(b"\x80") * 1000,
    "lead-bytes": byte_ids(b"\xf0\x9f") * 500,
    "special": [EOS] * 1000,
    "replacement": byte_ids("\ufffd".encode()) * 333,
    "mixed": (byte_ids(b"\x80\xe2\x82") + [EOS] * 9) * 80,
}


@pytest.mark.parametrize("name", STREAMS)
def test_cost_of_a_token_does_not_grow(name):
    ids = STREAMS[name]
    counting = CountingTokenizer(BYTES)
    detokenizer = Detokenizer(counting, stop=["never seen"])
    costs = []
    for token_id in ids:
        before = counting.num_ids
        detokenizer.push(token_id)
        costs.append(counting.num_ids - before)
    assert detokenizer.text + detokenizer.finish() == decode(ids)
    assert sum(costs) <= 24 * len(ids)
    assert max(costs[len(costs) // 2 :]) <= 150


fallback_words = st.sampled_from(["▁", "▁the", "▁film", "a", "b", "▁a", "the", "."])
fallback_parts = st.one_of(
    fallback_words.map(lambda word: [FALLBACK.token_to_id(word)]),
    st.sampled_from("é€😀한").map(lambda character: list(character.encode())),
)


@relaxed
@given(st.lists(fallback_parts, max_size=12).map(lambda parts: [*chain.from_iterable(parts)]))
def test_byte_fallback_gives_the_text_of_decoding_at_once(ids):
    assert "".join(stream(Detokenizer(FALLBACK), ids)) == FALLBACK.decode(ids)


any_fallback_id = st.one_of(st.integers(0x80, 0xFF), st.integers(256, 263))


@settings(relaxed, max_examples=150)
@given(st.lists(any_fallback_id, max_size=40))
def test_byte_fallback_loses_no_word_beside_invalid_bytes(ids):
    # How a run of invalid bytes comes out is open, the words around it are not.
    def words(text: str) -> str:
        return "".join(character for character in text if character.isascii())

    detokenizer = Detokenizer(FALLBACK)
    text = "".join(stream(detokenizer, ids))
    assert detokenizer.text == text
    assert words(text) == words(FALLBACK.decode(ids))


def test_invalid_byte_behind_a_character_leaves_the_character_as_it_was():
    # Decoded at once, the run of bytes is invalid as a whole and "€" would be three U+FFFD.
    ids = [*"€".encode(), 0x80, FALLBACK.token_to_id("▁a")]
    assert FALLBACK.decode(ids) == "\ufffd" * 4 + " a"
    assert "".join(stream(Detokenizer(FALLBACK), ids)) == "€\ufffd a"


def test_continuation_of_a_prompt_keeps_its_leading_space():
    prompt = [FALLBACK.token_to_id("▁the")]
    film = FALLBACK.token_to_id("▁film")
    assert Detokenizer(FALLBACK).push(film) == "film"
    assert Detokenizer(FALLBACK, prompt_token_ids=prompt).push(film) == " film"
    assert Detokenizer(BYTES, prompt_token_ids=byte_ids(b"a" * 50)).push(byte_ids(b"b")[0]) == "b"


def test_prompt_that_ends_inside_a_character_is_gone_on_with():
    data = "€".encode()
    detokenizer = Detokenizer(BYTES, prompt_token_ids=byte_ids(b"ab" + data[:2]))
    assert detokenizer.push(byte_ids(data[2:])[0]) == "€"
    literal = Detokenizer(BYTES, prompt_token_ids=byte_ids("a\ufffd".encode()))
    assert literal.push(byte_ids(b"x")[0]) == "x"
