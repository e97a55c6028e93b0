"""Which predictor an engine uses: by name, from a folder, or the one shipped with the model.

Owns the choice and the time limit of a forecast; knows neither cache nor prefetcher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..predictors.base import NAMES, UNTRAINED, Forecast, Predictor, predictor_class
from ..predictors.errors import PredictorError
from .errors import InvalidDataError, UsageError
from .models import adapter
from .models.origin import Narrowed, narrowed_gates, trained_shape

if TYPE_CHECKING:
    import torch

    from .models.loading import LoadedModel

logger = logging.getLogger(__name__)

SHIPPED = "predictor"
"""Folder inside a model's folder that holds the predictor shipped with it."""

LATE_S = 0.1
MAX_LATE = 3
"""So many forecasts in a row that took longer than LATE_S switch a predictor off. A token takes
that long at most; one or two may be the machine's doing."""

_FALLBACK = "lookahead"


@dataclass(frozen=True, slots=True)
class Speculation:
    """The predictor of an engine, by the name users see; `make` gives one a sequence, or None.

    `frequencies` [num_moe_layers, num_experts]: shares of training tokens that used each expert.
    """

    name: str
    make: Callable[[], Predictor | None]
    frequencies: np.ndarray | None = None


class LateForecastError(Exception):
    """A predictor takes so long that what it says comes too late."""


def shipped_predictor(folder: Path) -> Path | None:
    """The predictor in a model's folder, if it has one."""
    found = folder / SHIPPED
    return found if (found / "config.json").is_file() else None


def choose_predictor(wanted: str | Path, loaded: LoadedModel) -> Speculation:
    """The predictor called `wanted`: "auto", "none", a name or a folder made by `outrider train`.

    "auto" is the model's shipped one, else lookahead. Reads the whole folder. UsageError for a name
    that must be trained first; InvalidDataError for a folder that is damaged or of another model.
    """
    name = str(wanted)
    if name == "none":
        return _nothing()
    shipped = shipped_predictor(loaded.folder)
    if name == "auto":
        try:
            return _lookahead(loaded) if shipped is None else _from_folder(shipped, loaded)
        except InvalidDataError as error:
            # Nobody asked for it, so a model whose predictor does not fit still runs.
            logger.warning("the model's own predictor is left out: %s", error)
            return _lookahead(loaded)
    if name == _FALLBACK:
        return _lookahead(loaded)
    if name in UNTRAINED:
        kind = predictor_class(name)
        return Speculation(name, lambda: kind(loaded.shape))
    if name not in NAMES:
        return _from_folder(Path(name), loaded)
    if shipped is not None and _family_of(shipped) == name:
        return _from_folder(shipped, loaded)
    raise UsageError(
        f"predictor {name!r} must be trained for this model first: outrider collect ... --out "
        f"TRACES, outrider train TRACES --predictor {name} --out DIR, then --predictor DIR; "
        f"without training there are none, {', '.join(UNTRAINED)}"
    )


def _nothing() -> Speculation:
    return Speculation("none", lambda: None)


def _lookahead(loaded: LoadedModel) -> Speculation:
    gates = _gates(loaded)
    if gates is None:
        logger.warning("no look-ahead: the routers of this family are not plain gates")
        return _nothing()
    lookahead = predictor_class(_FALLBACK)
    scoring = adapter.router_scoring(loaded.layers[0])
    return Speculation(
        _FALLBACK, lambda: lookahead(loaded.shape, gates, scoring=scoring, tokens="all")
    )


def _from_folder(folder: Path, loaded: LoadedModel) -> Speculation:
    from ..predictors.checkpoint import load_predictor

    trained = trained_shape(loaded.checkpoint.config, loaded.shape)
    try:
        factory = load_predictor(folder, trained)
    except PredictorError as error:
        raise InvalidDataError(str(error)) from error
    gates = _gates(loaded) if factory.needs_gates else None
    if factory.needs_gates and gates is None:
        raise InvalidDataError(
            f"predictor {str(folder)!r} ({factory.name}) starts from the model's gates, and the "
            "routers of this family are not plain ones"
        )
    is_widened = trained != loaded.shape
    if is_widened and gates is not None:
        gates = narrowed_gates(gates, trained.hidden_size)
    scoring = adapter.router_scoring(loaded.layers[0])

    def make() -> Predictor:
        made = factory.make(gates, scoring=scoring, tokens="all")
        if is_widened:
            made = Narrowed(made, loaded.shape, size=trained.hidden_size)
        return Punctual(made)

    # What the first one makes ready is no part of the first request's time.
    make()
    return Speculation(factory.name, make, factory.frequencies)


def _gates(loaded: LoadedModel) -> list | None:
    gates = [adapter.router_gate(layer) for layer in loaded.layers]
    return None if any(gate is None for gate in gates) else gates


def _family_of(folder: Path) -> str | None:
    from ..predictors.checkpoint import read_config

    try:
        return read_config(folder).get("family")
    except PredictorError:
        return None


class Punctual:
    """A predictor under a time limit: LateForecastError once MAX_LATE like calls in a row overran.

    Whoever asks it switches it off then, as after any other error.
    """

    def __init__(self, predictor: Predictor, *, clock: Callable[[], float] | None = None) -> None:
        self.shape = predictor.shape
        self._predictor = predictor
        self._clock = clock or time.perf_counter
        # By method: a quick answer in the pass excuses no slow one before the token.
        self._num_late: dict[str, int] = {}

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._predictor.begin(prompt_ids)

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        return self._timed(self._predictor.before_token, token_id, horizon)

    def in_pass(self, layer_idx: int, router_input: torch.Tensor) -> Forecast | None:
        # A prompt's rows are many, and there the layers take longer too.
        if len(router_input) > 1:
            return self._predictor.in_pass(layer_idx, router_input)
        return self._timed(self._predictor.in_pass, layer_idx, router_input)

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: torch.Tensor | None,
    ) -> None:
        self._predictor.observe(layer_idx, topk_ids, topk_weights, router_input)

    def _timed(self, ask: Callable[..., Forecast | None], *arguments: Any) -> Forecast | None:
        began = self._clock()
        forecast = ask(*arguments)
        taken = self._clock() - began
        late = self._num_late.get(ask.__name__, 0) + 1 if taken > LATE_S else 0
        self._num_late[ask.__name__] = late
        if late >= MAX_LATE:
            raise LateForecastError(
                f"{MAX_LATE} forecasts in a row took over {LATE_S * 1000:.0f} ms, the last one "
                f"{taken * 1000:.0f} ms"
            )
        return forecast
