"""Reads traces back: typed batches, per-layer records, selections; bounded memory whatever the
size.

Owns the view of a whole trace folder. Knows nothing of models or text, and of shard files only that
they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CorruptShardError, TraceError
from ..schema import ModelShape
from .batch import Selection, TraceBatch, TraceRecord
from .columns import SPLITS, Probabilities
from .manifest import Manifest, read_manifest
from .shard import read_shard, verify_shard

if TYPE_CHECKING:
    import torch

log = logging.getLogger("outrider.collect")


class TraceReader:
    """A trace folder for reading. Opening reads the manifest only; every pass opens shards anew.

    A damaged shard raises CorruptShardError naming it; with `skip_bad` it is left out, logged and
    listed in `skipped`. Page checksums are verified on every read. Safe to use while a collector
    writes: it sees the shards that were finished when it was opened.
    """

    def __init__(self, directory: Path | str, *, skip_bad: bool = False) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory)
        self.skip_bad = skip_bad
        self.skipped: dict[str, str] = {}

    @property
    def shape(self) -> ModelShape:
        """The model these traces were taken from."""
        return self.manifest.shape

    @property
    def probabilities(self) -> Probabilities:
        """The form in which router log-probabilities were kept."""
        return self.manifest.probabilities

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Data sets in order of collection."""
        return tuple(dataset.name for dataset in self.manifest.datasets)

    @property
    def num_samples(self) -> int:
        """Samples in finished shards."""
        return self.manifest.num_finished

    @property
    def num_tokens(self) -> int:
        """Rows in finished shards."""
        return sum(shard.num_tokens for shard in self.manifest.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the finished shards and their hidden states."""
        return sum(shard.nbytes + shard.hidden_nbytes for shard in self.manifest.shards)

    def batches(self, selection: Selection | None = None) -> Iterator[TraceBatch]:
        """Batches of about 8192 tokens, in sample order; holds one row group in memory at a
        time.
        """
        selection = selection or Selection()
        self._check(selection)
        for shard in self.manifest.shards:
            if selection.datasets is not None and shard.dataset not in selection.datasets:
                continue
            try:
                if self.skip_bad:
                    # Else the sound row groups of a bad shard would have gone out before it is left
                    # out.
                    verify_shard(self.directory, shard)
                yield from read_shard(self.directory, self.manifest, shard, selection=selection)
            except CorruptShardError as error:
                if not self.skip_bad:
                    raise
                log.warning("skipped: %s", error)
                self.skipped[shard.file] = str(error)

    def records(self, selection: Selection | None = None) -> Iterator[TraceRecord]:
        """One record a sample and layer, layers innermost."""
        for batch in self.batches(selection):
            probabilities = None if batch.coded_log_probs is None else np.exp(batch.log_probs())
            for start, end in zip(batch.sample_offsets, batch.sample_offsets[1:], strict=False):
                for column, layer_idx in enumerate(batch.layers):
                    states = batch.hidden.get(layer_idx)
                    yield TraceRecord(
                        layer_id=layer_idx,
                        hidden_states=None if states is None else states[start:end],
                        target_routing=None
                        if probabilities is None
                        else probabilities[start:end, column],
                        target_top_k=batch.topk_ids[start:end, column],
                        token_ids=batch.token_id[start:end],
                        dataset_name=batch.dataset_names[batch.dataset[start]],
                        sample_id=int(batch.sample_id[start]),
                    )

    def routers(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The routers' own tensors (`layer_{l}.weight` ...) and their metadata; TraceError without
        them.
        """
        from safetensors import SafetensorError, safe_open

        path = self.directory / "routers.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{str(path)!r} cannot be read: {error}") from None

    def verify(self) -> None:
        """Compare every finished file with its checksum; reads all bytes. CorruptShardError at the
        first.
        """
        for shard in self.manifest.shards:
            verify_shard(self.directory, shard)

    def _check(self, selection: Selection) -> None:
        unknown = set(selection.datasets or ()) - set(self.dataset_names)
        if unknown:
            raise TraceError(
                f"no data set {', '.join(sorted(unknown))} in {str(self.directory)!r}; "
                f"it has {', '.join(self.dataset_names)}"
            )
        wrong = set(selection.splits or ()) - set(SPLITS)
        if wrong:
            raise TraceError(f"no split {', '.join(sorted(wrong))}; there are {', '.join(SPLITS)}")
        layers = [*(selection.layers or ()), *selection.hidden_layers]
        if any(not 0 <= layer_idx < self.shape.num_moe_layers for layer_idx in layers):
            raise TraceError(
                f"layers {layers} asked for; there are 0 to {self.shape.num_moe_layers - 1}"
            )
        missing = sorted(set(selection.hidden_layers) - set(self.manifest.hidden_layers))
        if missing:
            raise TraceError(
                f"hidden states of layers {missing} were not recorded; recorded are "
                f"{list(self.manifest.hidden_layers)} (collect with --hidden-states)"
            )


def open_traces(directories: Sequence[Path | str], *, skip_bad: bool = False) -> list[TraceReader]:
    """Readers of several folders of ONE model; TraceError naming the difference where shapes
    differ.
    """
    readers = [TraceReader(directory, skip_bad=skip_bad) for directory in directories]
    for reader in readers[1:]:
        for name in ModelShape.__slots__:
            first, other = getattr(readers[0].shape, name), getattr(reader.shape, name)
            if first != other:
                raise TraceError(
                    f"{str(readers[0].directory)!r} and {str(reader.directory)!r} are traces of "
                    f"different models: {name} is {first!r} and {other!r}; give traces of one"
                )
    return readers
