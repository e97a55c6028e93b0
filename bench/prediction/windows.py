"""The held-out windows that predictors are judged on, in memory. Knows traces, no predictor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...collect.trace import Selection, TraceReader
from ...runtime.errors import InvalidDataError

TEST_SPLIT = "test"
MIN_WINDOWS = 4
"""Fewer say nothing, and cannot be resampled."""


@dataclass(frozen=True, slots=True)
class Window:
    """One trace: T tokens of one document.

    `document` counts documents from 0. `topk_ids` [T, L, k] by weight, `topk_weights` likewise;
    `hidden` maps a layer to its router inputs [T, H] in the model's dtype.
    """

    document: int
    token_id: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    hidden: Mapping[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Windows in order of collection, and how many documents they come from."""

    windows: tuple[Window, ...]
    num_documents: int
    document_ids: frozenset[int]

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows."""
        return sum(len(window.token_id) for window in self.windows)


def read_windows(
    readers: Sequence[TraceReader],
    *,
    hidden_layers: Sequence[int],
    prompt_tokens: int,
    limit: int | None = None,
    split: str = TEST_SPLIT,
) -> HeldOut:
    """The split's windows that are longer than a prompt; at most `limit`, spread evenly over all.

    Blocks while reading. InvalidDataError where there are fewer than MIN_WINDOWS; CollectError for
    damaged shards and hidden states that were not recorded.
    """
    usable = _usable(readers, split, prompt_tokens)
    if len(usable) < MIN_WINDOWS:
        places = ", ".join(repr(str(reader.directory)) for reader in readers)
        raise InvalidDataError(
            f"{places}: {len(usable)} windows of the {split} split have more than {prompt_tokens} "
            f"tokens; at least {MIN_WINDOWS} are needed (about one trace in twenty is held out for "
            "the test): collect more traces"
        )
    wanted = set(usable if limit is None else usable[:: max(1, -(-len(usable) // limit))])
    windows: list[Window] = []
    documents: dict[int, int] = {}
    for number, reader in enumerate(readers):
        selection = Selection(splits=[split], hidden_layers=hidden_layers, log_probs=False)
        for batch in reader.batches(selection):
            ends = batch.sample_offsets[1:]
            for start, end in zip(batch.sample_offsets, ends, strict=False):
                if (number, int(batch.sample_id[start])) not in wanted:
                    continue
                rows = slice(int(start), int(end))
                document = documents.setdefault(int(batch.document_id[start]), len(documents))
                weights = batch.topk_weights
                windows.append(
                    Window(
                        document,
                        batch.token_id[rows].astype(np.int64),
                        batch.topk_ids[rows].astype(np.int64),
                        np.zeros(0) if weights is None else weights[rows].astype(np.float32),
                        {layer: states[rows].clone() for layer, states in batch.hidden.items()},
                    )
                )
    return HeldOut(tuple(windows), len(documents), frozenset(documents))


def _usable(
    readers: Sequence[TraceReader], split: str, prompt_tokens: int
) -> list[tuple[int, int]]:
    """(reader, sample) of each window long enough."""
    found = []
    for number, reader in enumerate(readers):
        for batch in reader.batches(Selection(splits=[split], weights=False, log_probs=False)):
            lengths = np.diff(batch.sample_offsets)
            samples = batch.sample_id[batch.sample_offsets[:-1]]
            found += [(number, int(one)) for one in samples[lengths > prompt_tokens]]
    return found
