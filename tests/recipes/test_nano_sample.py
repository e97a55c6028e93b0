"""The free sample takes whole documents, most of them held out, and comes back as it went in."""

from pathlib import Path

import pytest

from outrider.collect.corpora import offline
from outrider.collect.corpora.split import split_of
from recipes.nano import corpus, sample


def test_most_of_a_sample_is_held_out_and_its_size_is_bounded() -> None:
    by_split = {}
    for number in range(6000):
        document = offline.Document("plays", f"document {number} " + "word " * 100)
        by_split.setdefault(split_of(document.text), []).append(document)
    chosen = sample.choose(by_split)
    sizes = {"train": 0, "validation": 0, "test": 0}
    for document in chosen:
        sizes[split_of(document.text)] += len(document.text.encode())
    assert sum(sizes.values()) <= sample.BYTES_PER_DOMAIN
    assert all(sizes.values())


def test_bytes_a_split_lacks_are_taken_from_the_next() -> None:
    train = [offline.Document("code", f"{number} " + "x" * 10_000) for number in range(200)]
    chosen = sample.choose({"train": train})
    assert sum(len(document.text) for document in chosen) > 0.95 * sample.BYTES_PER_DOMAIN


def test_a_written_sample_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        domain: [f"{domain} {number} ünï\n" for number in range(30)] for domain in sample.LICENCES
    }

    def documents(_folder: Path, domain: str):
        found = {}
        for text in texts[domain]:
            found.setdefault(split_of(text), []).append(offline.Document(domain, text))
        return found

    monkeypatch.setattr(corpus, "documents", documents)
    stdlib = tmp_path / "stdlib"
    for licence in (
        tmp_path / "chitchat_dataset-0.9.0.dist-info" / "LICENSE",
        stdlib / "LICENSE.txt",
    ):
        licence.parent.mkdir()
        licence.write_text(f"the words of {licence.parent.name}")
    monkeypatch.setattr(sample.sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    sample.write(tmp_path, tmp_path / "sample")
    back = list(offline.sample(tmp_path / "sample"))
    assert {domain: sorted(d.text for d in back if d.domain == domain) for domain in texts} == {
        domain: sorted(all_of) for domain, all_of in texts.items()
    }
    licences = (tmp_path / "sample" / "LICENSES.md").read_text()
    assert all(f"{domain}.jsonl.xz" in licences for domain in texts)
    for name in ("chitchat-dataset.LICENSE.txt", "python.LICENSE.txt"):
        assert name in licences
        assert (tmp_path / "sample" / name).read_text().startswith("the words of")
