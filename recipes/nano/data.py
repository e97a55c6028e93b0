"""Which tokens a training step sees: windows of the six domains in turn, a pure function of the
step's number.

So a run that was interrupted sees what an uninterrupted one sees, and no random state need be
saved.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from outrider.collect.corpora.split import Split

from .corpus import DOMAINS


class Windows:
    """Non-overlapping windows of `length` + 1 tokens (the last is only predicted) of one split, by
    domain.
    """

    def __init__(self, folder: Path, split: Split, *, length: int) -> None:
        self.length = length
        self.streams = {
            domain: np.load(folder / f"{domain}.{split}.npy", mmap_mode="r", allow_pickle=False)
            for domain in DOMAINS
        }

    def count(self, domain: str) -> int:
        """How many windows the domain has."""
        return (len(self.streams[domain]) - 1) // self.length

    def window(self, domain: str, number: int) -> np.ndarray:
        """Window `number` in document order, int64 [length + 1]."""
        start = number * self.length
        return self.streams[domain][start : start + self.length + 1].astype(np.int64)

    def batch(self, step: int, *, sequences: int) -> Tensor:
        """The step's sequences [sequences, length + 1]: one domain after the other, each in
        shuffled passes.
        """
        rows = []
        for index in range(step * sequences, (step + 1) * sequences):
            domain = DOMAINS[index % len(DOMAINS)]
            passes, position = divmod(index // len(DOMAINS), self.count(domain))
            order = np.random.default_rng([passes, DOMAINS.index(domain)]).permutation(
                self.count(domain)
            )
            rows.append(self.window(domain, int(order[position])))
        return torch.from_numpy(np.stack(rows))


def bytes_per_token(folder: Path) -> Tensor:
    """UTF-8 bytes each token id stands for [V]; a special token stands for none."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = set(tokenizer.get_added_tokens_decoder())
    lengths = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in special else len(token)  # byte-level: one character a byte
    return lengths


def sizes(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Documents, bytes and tokens of every domain and split."""
    return json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
