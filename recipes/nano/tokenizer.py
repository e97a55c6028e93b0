"""outrider-nano's tokenizer: byte-level BPE of 4,096 entries, and the token streams made with it.

Owns the vocabulary and the encoded corpus. Knows nothing of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from outrider.collect.corpora.split import Split

from . import corpus

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 1024
SAMPLE_CHARS_PER_DOMAIN = (
    4_000_000  # what the vocabulary is learned from: every domain weighs the same
)

# Digits stand alone, so numbers are spelled, not memorised; indentation stays together, for code.
_PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer whose alphabet is all 256 bytes, so any text goes through and back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and what `AutoTokenizer` needs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def prepare(unpacked: Path, folder: Path) -> Path:
    """Learns the vocabulary on training documents and encodes all of them, once; -> `folder`.

    Leaves tokenizer.json, per domain and split a uint16 stream `DOMAIN.SPLIT.npy` of documents that
    each end with the end-of-text token, and sizes.json: documents, UTF-8 bytes and tokens of each.
    """
    if (folder / "sizes.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    domains = {domain: corpus.documents(unpacked, domain) for domain in corpus.DOMAINS}
    tokenizer = learn(
        text
        for split in domains.values()
        for text in _first(split["train"], SAMPLE_CHARS_PER_DOMAIN)
    )
    save(tokenizer, folder)
    sizes: dict[str, dict[Split, dict[str, int]]] = {}
    for domain, by_split in domains.items():
        sizes[domain] = {}
        for split, documents in by_split.items():
            texts = [document.text for document in documents]
            stream = encode(tokenizer, texts)
            np.save(folder / f"{domain}.{split}.npy", stream)
            sizes[domain][split] = {
                "documents": len(texts),
                "utf8_bytes": sum(len(text.encode()) for text in texts),
                "tokens": len(stream),
            }
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return folder


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Documents -> one uint16 stream, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = []
    for start in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 512]):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)


def _first(documents: list[corpus.Document], max_chars: int) -> Iterable[str]:
    taken = 0
    for document in documents:
        if taken >= max_chars:
            return
        taken += len(document.text)
        yield document.text
