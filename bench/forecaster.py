"""Lets a predictor follow a routing as the engine would, and keeps what it said. Knows no cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..collect.schema import ModelShape
from ..collect.trace import open_traces
from ..predictors.base import Forecast
from ..predictors.errors import PredictorError
from ..runtime.errors import InvalidDataError
from .foretold import Foretold
from .prediction.candidates import Candidates
from .routing import Routing, read_routing

if TYPE_CHECKING:
    import torch

HORIZON = 2
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Source:
    """Where sequences come from, so that a process can read them again, with hidden states."""

    directories: tuple[Path, ...]
    split: str
    max_tokens: int | None
    prompt_tokens: int
    seed: int

    @property
    def shape(self) -> ModelShape:
        """The model that these are traces of."""
        return open_traces(self.directories)[0].shape

    def read(self, *, hidden_layers: Sequence[int] = ()) -> Routing:
        """The sequences; see `read_routing`."""
        return read_routing(
            self.directories,
            split=self.split,
            max_tokens=self.max_tokens,
            hidden_layers=hidden_layers,
            prompt_tokens=self.prompt_tokens,
        )


def foretell(name: str, source: Source) -> Foretold:
    """What the predictor called `name` (or kept in that folder) says of every pass.

    Blocks for as long as it takes, training included. Raises UsageError for an unknown name,
    InvalidDataError for a predictor or traces that do not serve.
    """
    import torch

    torch.set_num_threads(1)
    try:
        candidate = Candidates(open_traces(source.directories), seed=source.seed).of(name)
        # The oracle knows all of it before the token; saying it again in the pass adds nothing.
        hidden_layers = () if name == ORACLE else candidate.hidden_layers
        routing = source.read(hidden_layers=hidden_layers)
        with torch.inference_mode():
            return follow(candidate.make, routing, prompt_tokens=source.prompt_tokens)
    except PredictorError as error:
        raise InvalidDataError(f"predictor {name}: {error}") from error


def follow(make: Callable[[], Any], routing: Routing, *, prompt_tokens: int) -> Foretold:
    """Call a predictor in the engine's order over every sequence. `make` gives one a sequence."""
    shape = routing.shape
    size = (routing.num_tokens, shape.num_moe_layers, shape.num_experts)
    before = np.zeros((HORIZON, *size), dtype=np.float16)
    is_known = np.zeros((HORIZON, routing.num_tokens), dtype=bool)
    layers: dict[int, np.ndarray] = {}

    def keep(layer_idx: int, row: int, forecast: Forecast | None) -> None:
        if forecast is None:
            return
        told = layers.get(layer_idx)
        if told is None:
            told = np.zeros((size[0], *forecast.probability.shape), dtype=np.float16)
            layers[layer_idx] = told
        told[row] = forecast.probability

    for start, end in zip(routing.offsets, routing.offsets[1:], strict=False):
        predictor = make()
        if hasattr(predictor, "foresee"):
            predictor.foresee(routing.topk_ids[start:end])
        first = int(start) + prompt_tokens
        predictor.begin(routing.token_id[start:first])
        for layer_idx in range(shape.num_moe_layers):
            _show(predictor, routing, layer_idx, slice(int(start), first))
        for row in range(first, int(end)):
            for ahead in range(HORIZON):
                forecast = predictor.before_token(int(routing.token_id[row]), ahead + 1)
                if forecast is not None:
                    before[ahead, row] = forecast.probability
                    is_known[ahead, row] = True
            for layer_idx in range(shape.num_moe_layers):
                keep(layer_idx, row, _show(predictor, routing, layer_idx, slice(row, row + 1)))
    horizon = int(is_known.any(axis=1).sum())
    return Foretold(
        offsets=routing.offsets,
        prompt_tokens=prompt_tokens,
        before=before[:horizon] if horizon else None,
        is_known=is_known[:horizon],
        layers=layers,
    )


def _show(predictor: Any, routing: Routing, layer_idx: int, rows: slice) -> Forecast | None:
    """One layer of one pass: the forecast made there, and then what the layer chose."""
    hidden = _hidden(routing, layer_idx, rows)
    forecast = None if hidden is None else predictor.in_pass(layer_idx, hidden)
    predictor.observe(
        layer_idx,
        routing.topk_ids[rows, layer_idx],
        routing.topk_weights[rows, layer_idx],
        hidden,
    )
    return forecast


def _hidden(routing: Routing, layer_idx: int, rows: slice) -> "torch.Tensor | None":
    states = routing.hidden.get(layer_idx)
    if states is None:
        return None
    import torch

    return torch.from_numpy(states[rows]).float()
