"""The ensemble: a forecast before the token, sharpened in the pass by how the state really drifts.

Takes whichever sources are there at the moment: before the token the learned family it contains; in
the pass that forecast's log-odds and the drift networks' scores, weighed by held-out log loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast, family_class
from .checkpoint import take
from .corrected import ranking_scores
from .drift import Stage, features_of, fit_stages, stage_of, state_of
from .errors import PredictorError
from .in_pass import DEPTH, later_layers, refuse_missing
from .live_stage import LiveForecast, States, stacked_gates
from .stacking import MAX_ROWS, fit_slopes, log_odds_of

if TYPE_CHECKING:
    from torch import Tensor

    from .context import ContextFamily
    from .examples import Examples
    from .journal import Journal
    from .lookahead import Gate
    from .presets import Settings

BEFORE = "hierarchical"
"""The family that speaks before the token, where none is handed in."""

_PREFIX = "before."


class Ensemble:
    """`slopes` [2, DEPTH, L, 2]: trust in the drift's scores and in the forecast before the token,
    at index 0 where both are there, at index 1 where only the drift is.
    """

    name = "ensemble"
    needs_gates = True

    def __init__(
        self,
        before: ContextFamily,
        stages: Sequence[Stage],
        slopes: np.ndarray,
    ) -> None:
        self.shape: ModelShape = before.shape
        self.before = before
        self.stages = list(stages)
        self.slopes = slopes
        self.hidden_layers = tuple(range(self.shape.num_moe_layers))
        self.frequencies = before.frequencies
        self._ready: list[LiveForecast] = []
        self._ready_for: Sequence[Gate] | None = None
        self._ready_scoring = ""

    @classmethod
    def fit(
        cls,
        examples: Examples,
        *,
        validation: Examples,
        settings: Settings,
        progress: Journal,
    ) -> Self:
        """Train the family before the token and the drift networks, then weigh them.

        Raises TrainingDataError without router inputs of all layers, or without gates.
        """
        cls.refuse(examples, validation)
        family = family_class(BEFORE)
        before = family.fit(examples, validation=validation, settings=settings, progress=progress)
        return cls.around(
            before,  # type: ignore[arg-type]
            examples,
            validation=validation,
            settings=settings,
            progress=progress,
        )

    @classmethod
    def around(
        cls,
        before: ContextFamily,
        examples: Examples,
        *,
        validation: Examples,
        settings: Settings,
        progress: Journal,
    ) -> Self:
        """An ensemble of a trained family before the token and drift networks trained now."""
        cls.refuse(examples, validation)
        gates = examples.gates or ()
        stages = fit_stages(examples, gates, settings=settings, progress=progress)
        made = cls(before, stages, _even_slopes(before.shape))
        made.weigh(validation, gates)
        return made

    @classmethod
    def refuse(cls, *parts: Examples) -> None:
        """TrainingDataError where router inputs of some layer or gates are not there."""
        for examples in parts:
            refuse_missing(examples, range(examples.shape.num_moe_layers), cls.name)

    def weigh(self, validation: Examples, gates: Sequence[Gate]) -> None:
        """Fit the slopes to held-out rows."""
        rows = validation.rows(1)
        rows = rows[:: max(1, -(-len(rows) // MAX_ROWS))]
        odds = np.concatenate(
            [
                log_odds_of(self.before.forecasts(validation, part))
                for part in np.array_split(rows, max(1, len(rows) // 1024))
            ]
        )
        used = validation.membership(rows)
        top_k = self.shape.top_k
        for layer_idx, stage in enumerate(self.stages):
            targets = later_layers(self.shape, layer_idx)
            features = features_of(validation, rows, layer_idx, gates)
            scores = _scores(
                stage, features, gates, targets, is_sigmoid=validation.scoring == "sigmoid"
            )
            for place, target in enumerate(targets):
                pair = [scores[:, place], odds[:, target]]
                both = fit_slopes(pair, used[:, target], top_k=top_k)
                alone = fit_slopes(pair[:1], used[:, target], top_k=top_k)
                self.slopes[0, place, target] = both
                self.slopes[1, place, target, 0] = alone[0]

    def make(
        self,
        gates: Sequence[Gate] | None = None,
        *,
        scoring: str = "softmax",
        tokens: str = "all",
    ) -> EnsemblePredictor:
        """A predictor for one sequence; without gates it speaks before the token only.

        What the first one for some gates makes ready is shared by the next, in the same thread.
        """
        if gates is not None and (self._ready_for is not gates or self._ready_scoring != scoring):
            is_sigmoid = scoring == "sigmoid"
            self._ready = [
                self._live(layer_idx, gates, is_sigmoid=is_sigmoid)
                for layer_idx in range(len(self.stages))
            ]
            self._ready_for, self._ready_scoring = gates, scoring
        return EnsemblePredictor(self, self._ready if gates is not None else [], tokens=tokens)

    def _live(self, layer_idx: int, gates: Sequence[Gate], *, is_sigmoid: bool) -> LiveForecast:
        targets = later_layers(self.shape, layer_idx)
        both, alone = self.slopes[:, np.arange(len(targets)), np.array(targets)]
        return LiveForecast(
            self.stages[layer_idx],
            layer_idx,
            gates,
            shape=self.shape,
            both=both,
            alone=alone,
            is_sigmoid=is_sigmoid,
        )

    def state(self) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        """See TrainedFamily."""
        inner, config = self.before.state()  # type: ignore[attr-defined]
        tensors = {_PREFIX + name: tensor for name, tensor in inner.items()}
        for layer_idx, stage in enumerate(self.stages):
            tensors |= state_of(stage, layer_idx)
        tensors["slopes"] = self.slopes
        return tensors, {"before": {"family": self.before.name, **config}}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        """See TrainedFamily."""
        described = dict(config["before"])
        family = family_class(described.pop("family"))
        if family is cls:
            raise PredictorError("before.family is an ensemble; it must be a single family")
        inner = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
        before = family.from_state(inner, described, shape)
        layers = shape.num_moe_layers
        stages = [stage_of(tensors, layer_idx, shape) for layer_idx in range(layers - 1)]
        slopes = take(tensors, "slopes", (2, DEPTH, layers, 2))
        return cls(before, stages, slopes)  # type: ignore[arg-type]


class EnsemblePredictor:
    """An Ensemble following one sequence."""

    def __init__(
        self,
        family: Ensemble,
        stages: Sequence[LiveForecast],
        *,
        tokens: str,
    ) -> None:
        self.shape = family.shape
        self._before = family.before.make()
        self._stages = stages
        self._last_only = tokens == "last"
        self._states = States(self.shape)
        self._odds: np.ndarray | None = None
        self._num_passes = 0

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._before.begin(prompt_ids)
        self._states.begin()
        self._odds = None
        self._num_passes = 0

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        forecast = self._before.before_token(token_id, horizon)
        if horizon == 1 and forecast is not None:
            self._odds = self._before.odds_of(forecast)
        return forecast

    def in_pass(self, layer_idx: int, router_input: Tensor) -> Forecast | None:
        if layer_idx >= len(self._stages):
            return None
        rows = router_input[-1:] if self._last_only else router_input
        table = self._stages[layer_idx](rows, self._states, self._odds)
        return Forecast(self._num_passes, layer_idx + 1, layer_idx + 1 + len(table), table)

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        if router_input is not None:
            stored = self._states.store(layer_idx, router_input)
            if len(router_input) == 1:
                router_input = stored
        self._before.observe(layer_idx, topk_ids, topk_weights, router_input)
        if layer_idx == self.shape.num_moe_layers - 1:
            self._states.end_pass()
            self._odds = None
            self._num_passes += 1


def _even_slopes(shape: ModelShape) -> np.ndarray:
    return np.ones((2, DEPTH, shape.num_moe_layers, 2), np.float32)


def _scores(
    stage: Stage,
    features: np.ndarray,
    gates: Sequence[Gate],
    targets: Sequence[int],
    *,
    is_sigmoid: bool,
) -> np.ndarray:
    """[N, D, E] by which the later routers are expected to rank."""
    weight, bias = stacked_gates(gates, targets)
    logits = stage.corrections(features)
    logits += features[:, : weight.shape[1]] @ weight.T
    return ranking_scores(
        logits.reshape(len(features), len(targets), -1), bias, is_sigmoid=is_sigmoid
    )
