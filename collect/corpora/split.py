"""The split of the project: which documents may be trained on, tuned on, reported on.

Owns one rule, by a document's text alone, so that the built-in model, traces, predictors and
perplexity agree without sharing a list. Knows nothing of where documents come from.
"""

from __future__ import annotations

from typing import Literal

import xxhash

Split = Literal["train", "validation", "test"]

TRAIN_PERCENT = 90
VALIDATION_PERCENT = 5


def document_hash(text: str) -> int:
    """xxh3_64 of the document's UTF-8 bytes; lone surrogates are encoded as they are."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def split_of(text: str) -> Split:
    """The split a whole document belongs to: hash mod 100 in 0-89 train, 90-94 validation, 95-99
    test.
    """
    bucket = document_hash(text) % 100
    if bucket < TRAIN_PERCENT:
        return "train"
    if bucket < TRAIN_PERCENT + VALIDATION_PERCENT:
        return "validation"
    return "test"
