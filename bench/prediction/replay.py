"""Runs a predictor over recorded windows exactly as the engine would, and keeps what it said.

Owns the order of calls and the clock; knows no metric. Router inputs come from the traces.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...collect.schema import ModelShape
from ...predictors.base import Forecast, Predictor
from ...predictors.oracle import Oracle
from ...runtime.errors import InvalidDataError
from .windows import Window

BEFORE, IN_PASS, PRE_ATTENTION = "before", "in_pass", "pre_attention"
HORIZONS = (1, 2)
Kind = tuple[str, int]
"""Moment and distance: tokens before the token, layers in the pass or before attention."""


@dataclass(slots=True)
class Timings:
    """Nanoseconds of each call, by moment."""

    before: list[int] = field(default_factory=list)
    in_pass: list[int] = field(default_factory=list)


class WindowReplay:
    """One pass over a window: the prompt at once, then token by token.

    Call order is the engine's: `begin`; for the prompt `in_pass` and `observe` by layer; then for
    each token `before_token` (horizons 1 and 2), and `in_pass` and `observe` by layer. A state is
    handed over as the model's own dtype, and None where it was not recorded.
    """

    def __init__(self, shape: ModelShape, *, prompt_tokens: int, moment: str = IN_PASS) -> None:
        self._shape = shape
        self._prompt_tokens = prompt_tokens
        self._moment = moment
        # What is known before layer l + 1's attention is distance 0 to that layer.
        self._is_pre_attention = int(moment == PRE_ATTENTION)
        self.timings = Timings()

    @torch.inference_mode()
    def run(self, predictor: Predictor, window: Window) -> dict[Kind, np.ndarray]:
        """What was forecast of the decode steps: float32 [T - prompt_tokens, L, E] a kind.

        NaN where nothing was said. InvalidDataError for a forecast that is malformed.
        """
        tables: dict[Kind, np.ndarray] = {}
        if isinstance(predictor, Oracle):
            predictor.foresee(window.topk_ids)
        predictor.begin(window.token_id[: self._prompt_tokens])
        self._pass(predictor, window, tables, rows=slice(0, self._prompt_tokens))
        for position in range(self._prompt_tokens, len(window.token_id)):
            token_id = int(window.token_id[position])
            for horizon in HORIZONS:
                clock = self.timings.before if horizon == 1 else None
                forecast = self._timed(clock, predictor.before_token, token_id, horizon)
                self._keep(tables, window, forecast, kind=(BEFORE, horizon))
            self._pass(predictor, window, tables, rows=slice(position, position + 1))
        return tables

    def _pass(
        self,
        predictor: Predictor,
        window: Window,
        tables: dict[Kind, np.ndarray],
        *,
        rows: slice,
    ) -> None:
        is_decode = rows.start >= self._prompt_tokens
        for layer_idx in range(self._shape.num_moe_layers):
            states = window.hidden.get(layer_idx)
            router_input = None if states is None else states[rows]
            if router_input is not None:
                clock = self.timings.in_pass if is_decode else None
                forecast = self._timed(clock, predictor.in_pass, layer_idx, router_input)
                if is_decode and forecast is not None:
                    for later in range(forecast.layer_from, forecast.layer_to):
                        kind = (self._moment, later - layer_idx - self._is_pre_attention)
                        self._keep(tables, window, forecast, kind=kind, layer_idx=later)
            predictor.observe(
                layer_idx,
                window.topk_ids[rows, layer_idx],
                window.topk_weights[rows, layer_idx],
                router_input,
            )

    def _timed(
        self, clock: list[int] | None, call: Callable[..., Forecast | None], *arguments: Any
    ) -> Forecast | None:
        started = time.perf_counter_ns()
        forecast = call(*arguments)
        elapsed = time.perf_counter_ns() - started
        if forecast is None:
            return None
        if clock is not None:
            clock.append(elapsed)
        try:
            forecast.check(self._shape)
        except ValueError as error:
            raise InvalidDataError(f"a forecast cannot be judged: {error}") from error
        return forecast

    def _keep(
        self,
        tables: dict[Kind, np.ndarray],
        window: Window,
        forecast: Forecast | None,
        *,
        kind: Kind,
        layer_idx: int | None = None,
    ) -> None:
        if forecast is None:
            return
        step = forecast.step - 1  # step 1 is the first token after the prompt
        num_steps = len(window.token_id) - self._prompt_tokens
        if not 0 <= step < num_steps:
            return
        table = tables.get(kind)
        if table is None:
            size = (num_steps, self._shape.num_moe_layers, self._shape.num_experts)
            table = tables[kind] = np.full(size, np.nan, dtype=np.float32)
        if layer_idx is None:
            table[step, forecast.layer_from : forecast.layer_to] = forecast.probability
        else:
            table[step, layer_idx] = forecast.probability[layer_idx - forecast.layer_from]
