"""Recorded routing as arrays, for replay: which experts each token of each sequence chose.

Knows trace folders and one file of its own, by which processes share the arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..collect.schema import ModelShape
from ..collect.trace import open_traces
from ..collect.trace.columns import SPLITS
from ..predictors.errors import TrainingDataError
from ..predictors.examples import Examples
from ..runtime.errors import UsageError

if TYPE_CHECKING:
    from ..predictors.lookahead import Gate

MIN_TOKENS = 256
"""Fewer decoded tokens are refused: a rate would be that of a few sentences."""

STABLE_TOKENS = 4096
"""Fewer are marked: rates of other text still differ by more than policies do."""


@dataclass(frozen=True, slots=True)
class Routing:
    """T tokens in sequences: `offsets` [S + 1] are row ranges, `document` [S] whose text each is.

    `token_id` [T], `topk_ids` [T, L, k] by descending weight, `topk_weights` [T, L, k] float32.
    `hidden` maps a layer to its router inputs [T, H], where they were recorded and wanted; `gates`
    and `scoring` are those of the model's routers, where the traces have them.
    """

    shape: ModelShape
    offsets: np.ndarray
    document: np.ndarray
    token_id: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    hidden: dict[int, np.ndarray] = field(default_factory=dict)
    gates: "Sequence[Gate] | None" = None
    scoring: str = "softmax"

    @property
    def num_tokens(self) -> int:
        """Rows of all sequences."""
        return len(self.token_id)

    def save(self, path: Path) -> None:
        """Write everything but the hidden states, for other processes of this run."""
        shape = self.shape
        sizes = (shape.num_moe_layers, shape.num_experts, shape.top_k, shape.hidden_size,
                 shape.expert_size)  # fmt: skip
        np.savez(
            path,
            shape=np.array(sizes),
            offsets=self.offsets,
            document=self.document,
            token_id=self.token_id,
            topk_ids=self.topk_ids,
            topk_weights=self.topk_weights,
        )


def load_routing(path: Path) -> Routing:
    """What `Routing.save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        layers, experts, top_k, hidden, inner = (int(size) for size in file["shape"])
        names = ("offsets", "document", "token_id", "topk_ids", "topk_weights")
        arrays = {name: file[name] for name in names}
    return Routing(shape=ModelShape(layers, experts, top_k, hidden, inner, ""), **arrays)


def read_routing(
    directories: Sequence[Path],
    *,
    split: str,
    max_tokens: int | None,
    hidden_layers: Sequence[int] = (),
    prompt_tokens: int = 4,
) -> Routing:
    """The sequences of one split (or "all") from trace folders of one model, in order.

    Stops after the sequence in which `max_tokens` is reached; a sequence no longer than its prompt
    is left out. Raises UsageError for too few tokens, collect's errors for damaged traces,
    TrainingDataError for hidden states that were not recorded.
    """
    readers = open_traces(directories)
    parts = []
    for one in SPLITS if split == "all" else (split,):
        try:
            parts.append(
                Examples.read(readers, one, hidden_layers=hidden_layers, max_tokens=max_tokens)
            )
        except TrainingDataError:
            # One of three splits may be empty; hidden states are missing in all of them.
            if (one == SPLITS[-1] and not parts) or split != "all":
                raise
    wanted = [
        (part, sequence)
        for part in parts
        for sequence in range(len(part.sample_offsets) - 1)
        if part.sample_offsets[sequence + 1] - part.sample_offsets[sequence] > prompt_tokens
    ]
    lengths = [int(np.diff(part.sample_offsets)[sequence]) for part, sequence in wanted]
    if max_tokens is not None:
        # The sequence in which the limit is reached is the last one.
        count = 1 + int(np.searchsorted(np.cumsum(lengths), max_tokens))
        wanted, lengths = wanted[:count], lengths[:count]
    decoded = sum(lengths) - prompt_tokens * len(lengths)
    if decoded < MIN_TOKENS:
        names = ", ".join(str(directory) for directory in directories)
        raise UsageError(
            f"{names}: {decoded} decoded tokens in split {split}; at least {MIN_TOKENS} are "
            "needed for a rate: collect more traces, or give another --split (all takes every one)"
        )

    def joined(values: Callable[[Examples], np.ndarray]) -> np.ndarray:
        rows = []
        for part, sequence in wanted:
            start, end = part.sample_offsets[sequence : sequence + 2]
            rows.append(values(part)[start:end])
        return np.concatenate(rows)

    document = joined(lambda part: part.document_id)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Routing(
        shape=readers[0].shape,
        offsets=offsets,
        document=document[offsets[:-1]],
        token_id=joined(lambda part: part.token_id),
        topk_ids=joined(lambda part: part.topk_ids).astype(np.int32),
        topk_weights=joined(lambda part: part.topk_weights),
        hidden={one: joined(lambda part, one=one: part.hidden[one]) for one in hidden_layers},
        gates=parts[0].gates,
        scoring=parts[0].scoring,
    )
