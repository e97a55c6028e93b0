"""Perplexity of an engine on held-out text, and of a packed store against its checkpoint.

Owns which text and how it is cut; every pass is the engine's own.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from ..collect.corpora.offline import sample
from ..collect.corpora.registry import SAMPLE_FOLDER
from ..collect.corpora.split import split_of
from .config import EngineConfig
from .engine import Engine
from .errors import OutriderError, UsageError
from .experts.identity import SourceIdentity
from .experts.layout import ExpertSource
from .experts.pack import pack_store
from .models import adapter
from .models.loading import LoadedModel
from .prompt import encode_text
from .tier import build_tier, plain_format

NUM_TOKENS = 4096
CONTEXT = 256
# Logits of one pass: 256 MiB in fp32, within what the engine keeps free for activations.
_MAX_LOGITS = 1 << 26
_MAX_MEAN = 700.0
_CHARS_PER_TOKEN = 4
_SPLIT = "test"
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Perplexities of one model on the same `tokens` predictions, experts read from two places."""

    text: str
    tokens: int
    context: int
    checkpoint: float
    packed: float

    @property
    def ratio(self) -> float:
        """Above 1 is what packing costs."""
        return self.packed / self.checkpoint

    def as_dict(self) -> dict[str, object]:
        """Fields of the document that `outrider pack --json` prints."""
        return {**asdict(self), "ratio": self.ratio}


def perplexity(
    engine: Engine,
    token_ids: Sequence[Sequence[int]],
    *,
    context: int,
    progress: Progress | None = None,
) -> float:
    """exp of the mean negative log-probability of each token given those before it.

    Documents are cut into windows of `context` tokens that do not overlap; a window's first token
    is not predicted. Blocks while the passes run; `progress(windows done, of)`. Raises UsageError
    where nothing is left to predict, OutriderError for logits that are no numbers.
    """
    windows = [
        window
        for document in token_ids
        for start in range(0, len(document), context)
        if len(window := document[start : start + context]) > 1
    ]
    if not windows:
        raise UsageError("perplexity: no document of two tokens or more")
    per_pass = max(1, _MAX_LOGITS // (engine.vocab_size * context))
    total = 0.0
    for start in range(0, len(windows), per_pass):
        for logprobs in engine.logprobs(windows[start : start + per_pass]):
            total -= float(logprobs.double().sum())
        if progress is not None:
            progress(min(start + per_pass, len(windows)), len(windows))
    mean = total / sum(len(window) - 1 for window in windows)
    # NaN is not less than anything; beyond it exp overflows.
    if not mean < _MAX_MEAN:
        raise OutriderError(f"perplexity: the mean negative log-probability is {mean}")
    return math.exp(mean)


def held_out(tokenizer: Any, *, num_tokens: int, context: int) -> tuple[str, list[list[int]]]:
    """What text, and windows of at most `context` token ids with `num_tokens` predictions in all.

    From documents of the test split of the repository's own sample, its domains and their documents
    in turn; each window is tokenised as a text of its own.
    """
    domains: dict[str, list[list[str]]] = {}
    for document in sample(SAMPLE_FOLDER):
        if split_of(document.text) == _SPLIT:
            size = context * _CHARS_PER_TOKEN
            pieces = [document.text[at : at + size] for at in range(0, len(document.text), size)]
            domains.setdefault(document.domain, []).append(pieces)
    windows: list[list[int]] = []
    for piece in _in_turn([_in_turn(documents) for documents in domains.values()]):
        if num_tokens < 1:
            break
        window = encode_text(tokenizer, piece)[: min(context, num_tokens + 1)]
        if len(window) > 1:
            windows.append(window)
            num_tokens -= len(window) - 1
    return f"sample:{','.join(domains)} ({_SPLIT} split)", windows


def compare(
    loaded: LoadedModel,
    store: ExpertSource,
    *,
    tokenizer: Any,
    scratch: Path,
    progress: Callable[[str, int, int], None],
) -> Comparison:
    """Perplexity with experts read from the checkpoint, then from `store`. Blocks for both runs.

    An encoded checkpoint is decoded for this into a folder under `scratch`, removed afterwards.
    Raises OutriderError.
    """
    # A prompt of the whole context would leave no room for the token that an engine makes of it.
    context = min(CONTEXT, (adapter.context_length(loaded.config) or CONTEXT + 1) - 1)
    text, windows = held_out(tokenizer, num_tokens=NUM_TOKENS, context=context)
    config = EngineConfig(device=str(loaded.device))
    measured = []
    with _checkpoint_source(loaded, scratch) as checkpoint:
        for source in (checkpoint, store):
            tier = build_tier(loaded, config, source=source)
            with Engine(loaded, tier, config=config, tokenizer=tokenizer) as engine:
                what = f"perplexity as {source.format}"
                measured.append(
                    perplexity(
                        engine,
                        windows,
                        context=context,
                        progress=lambda done, total, what=what: progress(what, done, total),
                    )
                )
    return Comparison(text, sum(len(one) - 1 for one in windows), context, *measured)


@contextmanager
def _checkpoint_source(loaded: LoadedModel, scratch: Path) -> Iterator[ExpertSource]:
    if loaded.in_place_obstacle() is None:
        yield loaded.experts_in_place()
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".perplexity-") as folder:
        yield pack_store(
            Path(folder) / "store",
            shape=loaded.shape,
            fmt=plain_format(loaded.dtype),
            layers=loaded.layer_tensors,
            source=SourceIdentity.of(
                loaded.folder, loaded.checkpoint.files, fingerprint=loaded.shape.fingerprint
            ),
            is_transposed=loaded.layers[0].experts.is_transposed,
        )


def _in_turn(lists: Iterable[Sequence[T]]) -> list[T]:
    """The first of each list, then the second of each, and so on."""
    return [one for one in chain(*zip_longest(*lists)) if one is not None]
