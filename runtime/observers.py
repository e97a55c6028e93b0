"""The predictors that follow the sequences of a pass: asked, shown what happened, set aside if they
err.

A predictor may be a file that somebody trained: whatever goes wrong in it costs speed only.
"""

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..collect.schema import ModelShape
from ..predictors.base import Forecast, Predictor

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Observer:
    """Rows [start, end) of a pass belong to the sequence that `predictor` follows.

    `step` is that sequence's own count of passes; `token_id` the token it decodes now, None in a
    prefill.
    """

    predictor: Predictor
    start: int
    end: int
    step: int
    token_id: int | None


class Observers:
    """Those of one pass after another. Forecasts of several sequences are joined into one: an
    expert is used if any of them uses it."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._present: list[Observer] = []
        self._failed: list[Predictor] = []
        self.has_failed = False
        """A predictor was switched off at some time."""

    def __bool__(self) -> bool:
        return bool(self._present)

    @property
    def decoding(self) -> list[Observer]:
        """Those whose sequence decodes a token in this pass."""
        return [one for one in self._present if one.token_id is not None]

    def begin(self, observers: Sequence[Observer]) -> None:
        """A pass with these begins; those that failed before are left out."""
        # Predictors of sequences that have ended are let go.
        self._failed = [
            bad for bad in self._failed if any(one.predictor is bad for one in observers)
        ]
        self._present = [
            one for one in observers if not any(one.predictor is bad for bad in self._failed)
        ]

    def dismiss(self) -> None:
        """Nobody is asked or shown anything for the rest of the pass."""
        self._present = []

    def before_token(self, horizon: int, *, step: int) -> list[Forecast]:
        """Forecasts for the pass's own token (horizon 1) or the one after it (2), of `step`."""
        return self._joined(
            [self._ask(one, "before_token", one.token_id, horizon) for one in self.decoding],
            step=step,
        )

    def in_pass(self, layer_idx: int, hidden_states: torch.Tensor, *, step: int) -> list[Forecast]:
        """Forecasts for the layers behind `layer_idx`, of what its router saw [T, H]."""
        return self._joined(
            [
                self._ask(one, "in_pass", layer_idx, hidden_states[one.start : one.end])
                for one in list(self._present)
            ],
            step=step,
        )

    def observe(
        self, layer_idx: int, ids: np.ndarray, weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """Show what a layer chose: ids and weights [T, K], hidden_states [T, H]."""
        host_weights = weights.float().cpu().numpy()
        for one in list(self._present):
            rows = slice(one.start, one.end)
            self._ask(one, "observe", layer_idx, ids[rows], host_weights[rows], hidden_states[rows])

    def _joined(self, forecasts: Sequence[Forecast | None], *, step: int) -> list[Forecast]:
        # Predictors count the steps in which they were asked; what they speak of is known here.
        return _union([replace(one, step=step) for one in forecasts if one is not None])

    def _ask(self, observer: Observer, method: str, *arguments: Any) -> Forecast | None:
        try:
            forecast = getattr(observer.predictor, method)(*arguments)
            if forecast is None:
                return None
            forecast.check(self._shape)
            operator.index(forecast.step)
        except Exception as error:
            logger.warning(
                "predictor %s failed in %s and is switched off: %s",
                type(observer.predictor).__name__,
                method,
                error,
            )
            self._present.remove(observer)
            self._failed.append(observer.predictor)
            self.has_failed = True
            return None
        return forecast


def _union(forecasts: list[Forecast]) -> list[Forecast]:
    """One forecast per range of layers and step."""
    if len(forecasts) < 2:
        return forecasts
    unused: dict[tuple[int, int, int], np.ndarray] = {}
    for forecast in forecasts:
        key = (forecast.step, forecast.layer_from, forecast.layer_to)
        unused[key] = unused.get(key, np.float32(1.0)) * (1.0 - forecast.probability)
    return [Forecast(*key, probability=1.0 - chance) for key, chance in unused.items()]
