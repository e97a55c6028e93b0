"""The split is fixed for good: other programs hold figures that depend on it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.collect.corpora.split import document_hash, split_of


def test_hash_is_xxh3_of_the_utf8_bytes() -> None:
    # The first is xxh3's published value for no input with seed 0.
    assert document_hash("") == 0x2D06800538D394C2
    assert document_hash("é") != document_hash("e\u0301")


@pytest.mark.parametrize(
    ("text", "split"),
    [
        # the edges of the buckets 0-89, 90-94, 95-99
        ("golden 132", "train"),
        ("golden 188", "train"),
        ("golden 30", "validation"),
        ("golden 62", "validation"),
        ("golden 78", "test"),
        ("golden 219", "test"),
    ],
)
def test_golden_splits(text: str, split: str) -> None:
    assert split_of(text) == split


def test_shares_of_many_documents() -> None:
    splits = [split_of(f"document number {number}") for number in range(20_000)]
    assert abs(splits.count("train") / 20_000 - 0.90) < 0.01
    assert abs(splits.count("validation") / 20_000 - 0.05) < 0.005
    assert abs(splits.count("test") / 20_000 - 0.05) < 0.005


@given(st.text())
def test_split_follows_from_the_hash_alone(text: str) -> None:
    bucket = document_hash(text) % 100
    assert split_of(text) == ("train" if bucket <= 89 else "validation" if bucket <= 94 else "test")
