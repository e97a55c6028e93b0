"""The choice of windows: balanced, deterministic, never the same text twice."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.corpora.corpus import Corpus
from outrider.collect.corpora.split import document_hash, split_of
from outrider.collect.errors import CorpusError
from outrider.collect.sampling import choose_samples, special_prefix
from outrider.collect.trace.columns import SPLITS


def _corpus(name, texts):
    return Corpus(name, f"test:{name}", lambda: iter(texts))


def _distinct_words(*lengths, first=0):
    """Documents in which no word occurs twice anywhere, so that a word says where it stood."""
    texts, word = [], first
    for length in lengths:
        texts.append(" ".join(f"w{word + number}" for number in range(length)))
        word += length
    return texts


def _real_tokens(samples):
    return [row[:n].tolist() for row, n in zip(samples.token_ids, samples.lengths, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    window=st.integers(1, 40),
    traces=st.integers(1, 60),
    seed=st.integers(0, 2**63),
)
def test_windows_are_runs_of_their_document_and_never_meet(toy, lengths, window, traces, seed):
    texts = _distinct_words(*lengths)
    words = [[int(word[1:]) for word in text.split()] for text in texts]
    by_id = {document_hash(text): (text, row) for text, row in zip(texts, words, strict=True)}
    # Long documents are cut into pieces of 32 characters a token; each may lose a last part.
    most = sum(max(n // window, n >= min(16, window)) for n in lengths)
    try:
        (samples,) = choose_samples(
            [_corpus("a", texts)],
            toy.WordTokenizer(),
            traces=traces,
            context_tokens=window,
            seed=seed,
        )
    except CorpusError:
        assert traces > most * 0.5
        return
    assert len(samples) == traces <= most
    used: list[int] = []
    for number, tokens in enumerate(_real_tokens(samples)):
        text, row = by_id[int(samples.document_id[number])]
        at = row.index(tokens[0])
        assert row[at : at + len(tokens)] == tokens
        assert len(tokens) == window or (at == 0 and len(tokens) == len(row) < window)
        assert SPLITS[samples.split[number]] == split_of(text)
        rest = text[int(samples.offset[number]) :].split()
        assert [int(word[1:]) for word in rest[: len(tokens)]] == tokens
        used += tokens
    assert len(used) == len(set(used))


def test_traces_are_spread_evenly(toy):
    corpora = [toy.corpus(name, documents=90, words=30) for name in "abcdef"]
    for traces in (100, 101, 105):
        chosen = choose_samples(
            corpora, toy.WordTokenizer(), traces=traces, context_tokens=8, seed=0
        )
        counts = [len(samples) for samples in chosen]
        assert sum(counts) == traces and max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def test_as_many_documents_as_possible_are_seen(toy):
    texts = _distinct_words(*[100] * 10)
    for traces, documents in ((7, 7), (10, 10), (25, 10)):
        (samples,) = choose_samples(
            [_corpus("a", texts)], toy.WordTokenizer(), traces=traces, context_tokens=10, seed=3
        )
        assert samples.num_documents == documents
        counts = np.unique(samples.document_id, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1


def test_neither_order_nor_duplicates_of_a_corpus_matter(toy):
    texts = _distinct_words(*range(20, 60))
    shuffled = [*texts[::-1], *texts[5:9]]

    def chosen(documents, seed):
        (samples,) = choose_samples(
            [_corpus("a", documents)],
            toy.WordTokenizer(),
            traces=50,
            context_tokens=12,
            seed=seed,
        )
        return samples

    assert chosen(texts, 1).digest() == chosen(texts, 1).digest() == chosen(shuffled, 1).digest()
    assert chosen(texts, 1).digest() != chosen(texts, 2).digest()


def test_every_part_of_a_document_can_be_chosen(toy):
    text = _distinct_words(600)
    firsts = set()
    for seed in range(60):
        (samples,) = choose_samples(
            [_corpus("a", text)], toy.WordTokenizer(), traces=1, context_tokens=10, seed=seed
        )
        firsts.add(int(samples.token_ids[0, 0]))
    assert min(firsts) < 120 and max(firsts) > 480 and len(firsts) > 30


def test_what_one_corpus_lacks_the_others_give(toy, caplog):
    corpora = [
        _corpus("small", _distinct_words(25, 25)),
        _corpus("large", _distinct_words(*[40] * 40, first=10_000)),
    ]
    small, large = choose_samples(
        corpora, toy.WordTokenizer(), traces=60, context_tokens=10, seed=0
    )
    assert (len(small), len(large)) == (4, 56)
    assert "small holds 4 windows of 10 tokens, not 30" in caplog.text
    with pytest.raises(CorpusError, match=r"small, large hold 164 windows.*300 traces"):
        choose_samples(corpora, toy.WordTokenizer(), traces=300, context_tokens=10, seed=0)


def test_short_documents_give_one_short_window_and_tiny_ones_none(toy):
    texts = _distinct_words(15, 16, 40, 63)
    (samples,) = choose_samples(
        [_corpus("a", texts)], toy.WordTokenizer(), traces=3, context_tokens=64, seed=0
    )
    assert sorted(samples.lengths.tolist()) == [16, 40, 63]
    assert samples.token_ids.shape == (3, 64)
    with pytest.raises(CorpusError, match="no document of at least 16 tokens"):
        choose_samples(
            [_corpus("a", texts[:1])], toy.WordTokenizer(), traces=1, context_tokens=64, seed=0
        )


def test_what_the_tokenizer_puts_before_a_text_begins_each_window(toy):
    tokenizer = toy.WordTokenizer(prefix=(1, 2))
    assert special_prefix(tokenizer) == [1, 2]
    (samples,) = choose_samples(
        [_corpus("a", _distinct_words(100, first=5))],
        tokenizer,
        traces=4,
        context_tokens=12,
        seed=0,
    )
    assert (samples.token_ids[:, :2] == [1, 2]).all()
    assert set(samples.lengths) == {12}
    bodies = [set(row[2:]) for row in samples.token_ids.tolist()]
    assert all(not a & b for a, b in combinations(bodies, 2))


def test_lone_surrogates_cannot_break_the_tokenizer(toy):
    texts = ["w1 \ud800 " + " ".join(f"w{n}" for n in range(30))]
    (samples,) = choose_samples(
        [_corpus("a", texts)], toy.WordTokenizer(), traces=1, context_tokens=8, seed=0
    )
    assert len(samples) == 1


def test_impossible_requests_are_refused(toy):
    corpora = [_corpus(name, _distinct_words(50)) for name in "ab"]
    with pytest.raises(CorpusError, match="1 traces over 2 data sets"):
        choose_samples(corpora, toy.WordTokenizer(), traces=1, context_tokens=8, seed=0)
    with pytest.raises(CorpusError, match="accepted are 3 to 65535"):
        choose_samples(corpora, toy.WordTokenizer((1, 2)), traces=2, context_tokens=2, seed=0)
