"""The manifest of a trace folder: what was collected, from which model, how, and which shards are
finished.

A shard counts only when the manifest lists it. Owns the file's form and the comparison that guards
a resume.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..durable import durable_write
from ..errors import ResumeError, TraceError
from ..schema import ModelShape
from .columns import SCHEMA_VERSION, Probabilities

MANIFEST_NAME = "manifest.json"


class DatasetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data set's share: samples `first_sample` to `first_sample + num_samples - 1`.

    `digest` is xxh3_64 (hex) over the samples' tokens and origins: the text that was really used.
    """

    name: str
    source: str
    first_sample: int
    num_samples: int
    num_tokens: int
    num_documents: int
    digest: str


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard. `file` and `hidden` are relative to the folder; checksums are xxh3_64
    (hex).
    """

    file: str
    dataset: str
    first_sample: int
    num_samples: int
    num_tokens: int
    batch_size: int
    nbytes: int
    checksum: str
    hidden: str | None = None
    hidden_nbytes: int = 0
    hidden_checksum: str = ""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a reader or a resuming collector must know; `shards` grows, the rest stays.

    `scoring` says what `router_log_probs` are the logarithm of: "softmax" of the router's logits,
    or "sigmoid" scores divided by their sum. `hidden_layers` are Mixture-of-Experts layers.
    `kernels` names what computed the passes (an instruction set, or "torch"): near ties may fall
    otherwise with others. Empty in folders begun before it was recorded.
    """

    schema_version: int
    shape: ModelShape
    model: str
    format: str
    dtype: str
    device: str
    tokenizer: str
    context_tokens: int
    seed: int
    batch_size: int
    threads: int
    samples_per_shard: int
    probabilities: Probabilities
    scoring: str
    hidden_layers: tuple[int, ...]
    datasets: tuple[DatasetEntry, ...]
    software: dict[str, str]
    created: str
    kernels: str = ""
    complete: bool = False
    shards: tuple[ShardEntry, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples planned, over all data sets."""
        return sum(dataset.num_samples for dataset in self.datasets)

    @property
    def num_finished(self) -> int:
        """Samples in finished shards."""
        return sum(shard.num_samples for shard in self.shards)


# May differ between the run that began a folder and the one that goes on: none changes a recorded
# row once batch size, threads and dtype are taken from the manifest.
_FREE_TO_DIFFER = frozenset(
    {
        "software",
        "created",
        "complete",
        "shards",
        "model",
        "batch_size",
        "samples_per_shard",
        "threads",
    }
)


def refuse_differences(begun: Manifest, asked: Manifest, directory: Path) -> None:
    """Raises ResumeError naming each field in which `asked` would not continue what `begun`
    recorded.
    """
    differences = []
    for name in Manifest.__struct_fields__:
        old, new = getattr(begun, name), getattr(asked, name)
        if name in _FREE_TO_DIFFER or old == new or (name == "kernels" and not old):
            continue
        if name == "datasets":
            differences += _dataset_differences(old, new)
        elif name == "shape":
            fields = [
                (field, getattr(old, field), getattr(new, field)) for field in ModelShape.__slots__
            ]
            differences += [f"shape.{f}: {a!r}, now {b!r}" for f, a, b in fields if a != b]
        else:
            differences.append(f"{name}: {old!r}, now {new!r}")
    if differences:
        raise ResumeError(
            f"{str(directory)!r} was begun with other settings and cannot be resumed "
            f"({'; '.join(differences)}); ask for the same settings, or collect into a new folder"
        )


def _dataset_differences(old: tuple[DatasetEntry, ...], new: tuple[DatasetEntry, ...]) -> list[str]:
    old_names, new_names = [d.name for d in old], [d.name for d in new]
    if old_names != new_names:
        return [f"datasets: {', '.join(old_names)}, now {', '.join(new_names)}"]
    differences = []
    for before, now in zip(old, new, strict=True):
        if before.num_samples != now.num_samples:
            differences.append(
                f"traces of {before.name}: {before.num_samples}, now {now.num_samples}"
            )
        elif before != now:
            differences.append(
                f"the text of {before.name}: digest {before.digest}, now {now.digest}"
            )
    return differences


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a trace folder. TraceError where there is none or it is of another schema."""
    path = directory / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise TraceError(
            f"{str(directory)!r} is not a trace folder: it has no {MANIFEST_NAME}; "
            "make one with `outrider collect`"
        ) from None
    try:
        version = msgspec.json.decode(raw, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise TraceError(
                f"{str(path)!r} has schema version {version}; "
                f"this version of outrider reads {SCHEMA_VERSION}"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise TraceError(f"{str(path)!r} is not a valid manifest: {error}") from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest, whole or not at all. Blocks on fsync."""
    with durable_write(directory / MANIFEST_NAME) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2))


class _Version(msgspec.Struct):
    schema_version: int
