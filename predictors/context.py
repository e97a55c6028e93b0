"""What a before-the-token family sees: the new token's id; ids, experts, states of the last ones.

A window is the same for one sequence that runs and for many rows of recorded traces, so a family is
written once and judged as it runs. Knows no family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..collect.schema import ModelShape
from .base import Forecast
from .calibration import Calibration
from .in_pass import to_host
from .stacking import log_odds_of

if TYPE_CHECKING:
    from torch import Tensor

    from .examples import Examples

UNKNOWN = -1
MAX_ROWS = 1536
"""Held-out rows that calibrate: each has every expert's outcome of a layer."""


@dataclass(frozen=True, slots=True)
class Window:
    """N forecasts' inputs with up to C past tokens each, the newest first.

    `token_id` [N] int64 of the token about to run; `past_ids` [N, C] int64, UNKNOWN where it is
    not; `topk_ids` [N, C, L, k] int64, `topk_weights` [N, C, L, k] float32; `hidden`
    [N, C, layers, hidden_size] float32 or float16, with no layer where none is read; `length` [N]
    past tokens that are there: what lies behind them is zero.
    """

    token_id: np.ndarray
    past_ids: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    hidden: np.ndarray
    length: np.ndarray


def window_of(
    examples: Examples, rows: np.ndarray, *, context: int, hidden_layers: Sequence[int] = ()
) -> Window:
    """The windows before the tokens of `rows` [N], from recorded samples."""
    length = np.minimum(examples.position[rows], context)
    past = rows[:, None] - np.arange(1, context + 1)
    is_there = np.arange(context) < length[:, None]
    past = np.where(is_there, past, rows[:, None])
    layers = [examples.hidden[layer_idx][past] for layer_idx in hidden_layers]
    size = examples.shape.hidden_size
    hidden = np.stack(layers, axis=2) if layers else np.zeros((*past.shape, 0, size), np.float32)
    ids = examples.topk_ids[past].astype(np.int64)
    weights = examples.topk_weights[past].astype(np.float32)
    for values in (hidden, ids, weights):
        values[~is_there] = 0
    return Window(
        token_id=examples.token_id[rows].astype(np.int64),
        past_ids=np.where(is_there, examples.token_id[past], UNKNOWN).astype(np.int64),
        topk_ids=ids,
        topk_weights=weights,
        hidden=hidden,
        length=length,
    )


class History:
    """One running sequence's window, kept up to date by the calls a Predictor gets.

    Counts passes by the layers it is shown, so that a pass before which nobody asked for a
    forecast is counted too; its token is then UNKNOWN.
    """

    def __init__(
        self, shape: ModelShape, *, context: int, hidden_layers: Sequence[int] = ()
    ) -> None:
        self.shape = shape
        self.context = context
        self._hidden_layers = {layer_idx: at for at, layer_idx in enumerate(hidden_layers)}
        cells = (1, context, shape.num_moe_layers, shape.top_k)
        self._ids = np.zeros(cells, np.int64)
        self._weights = np.zeros(cells, np.float32)
        self._hidden = np.zeros((1, context, len(hidden_layers), shape.hidden_size), np.float32)
        self._past_ids = np.full((1, context), UNKNOWN, np.int64)
        self._arrays = (self._ids, self._weights, self._hidden, self._past_ids)
        self.begin(np.zeros(0, np.int64))

    def begin(self, prompt_ids: np.ndarray) -> None:
        """A new sequence, whose prefill will run these ids."""
        self._length = 0
        self._num_passes = 0
        self._last_layer = self.shape.num_moe_layers
        self._num_new = 0
        self._pending = np.asarray(prompt_ids, np.int64)
        for array in self._arrays:
            array[:] = 0
        self._past_ids[:] = UNKNOWN

    @property
    def step(self) -> int:
        """The pass that comes next; 1 is the first after the prefill."""
        return max(self._num_passes, 1)

    def window(self, token_id: int) -> Window:
        """The window before `token_id` runs. Arrays are live: valid until the next `observe`."""
        self._pending = np.array([token_id], np.int64)
        return Window(
            token_id=self._pending,
            past_ids=self._past_ids,
            topk_ids=self._ids,
            topk_weights=self._weights,
            hidden=self._hidden,
            length=np.array([self._length]),
        )

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        """What one layer chose for the tokens of a pass, oldest first."""
        if layer_idx <= self._last_layer:
            self._begin_pass(len(topk_ids))
        self._last_layer = layer_idx
        new = self._num_new
        if not new:
            return
        at = self._hidden_layers.get(layer_idx)
        if new == 1:
            self._ids[0, 0, layer_idx] = topk_ids[-1]
            self._weights[0, 0, layer_idx] = topk_weights[-1]
            if at is not None and router_input is not None:
                self._hidden[0, 0, at] = to_host(router_input, last_only=True)
            return
        self._ids[0, :new, layer_idx] = topk_ids[: -new - 1 : -1]
        self._weights[0, :new, layer_idx] = topk_weights[: -new - 1 : -1]
        if at is not None and router_input is not None:
            states = router_input[-new:].detach().float().cpu().numpy()
            self._hidden[0, :new, at] = states[::-1]

    def _begin_pass(self, num_tokens: int) -> None:
        self._num_passes += 1
        ran, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        new = self._num_new = min(num_tokens, self.context)
        self._length = min(self._length + num_tokens, self.context)
        for array in self._arrays:
            array[:, new:] = array[:, : self.context - new]
            array[:, :new] = 0
        self._past_ids[:, :new] = UNKNOWN
        if len(ran) == num_tokens:
            self._past_ids[0, :new] = ran[: -new - 1 : -1]


class ContextFamily(ABC):
    """A trained family that answers before the token: scores from a window, then calibrated.

    `horizon` is the furthest token it speaks of; `parameters` counts trained numbers.
    """

    name: ClassVar[str]
    needs_gates = False

    def __init__(
        self,
        shape: ModelShape,
        *,
        frequencies: np.ndarray,
        context: int,
        horizon: int,
        hidden_layers: tuple[int, ...] = (),
    ) -> None:
        self.shape = shape
        self.frequencies: np.ndarray | None = frequencies
        self.context = context
        self.horizon = horizon
        self.hidden_layers = hidden_layers
        self.calibration = Calibration.identity(shape, horizon=horizon)

    @abstractmethod
    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        """[N, L, E] float32, before calibration: higher is likelier."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Trained numbers."""

    def forecasts(self, examples: Examples, rows: np.ndarray, *, horizon: int = 1) -> np.ndarray:
        """[N, L, E] float32 calibrated probabilities before the tokens of `rows`.

        Horizon 2 of row t speaks of row t + 1. Memory grows with N; hand over a few thousand.
        """
        window = window_of(examples, rows, context=self.context, hidden_layers=self.hidden_layers)
        return self.calibration.probability(self.log_odds(window, horizon), horizon)

    def make(
        self, gates: Any = None, *, scoring: str = "softmax", tokens: str = "all"
    ) -> ContextPredictor:
        """A predictor for one sequence; it needs no gates."""
        return ContextPredictor(self)

    def calibrate(self, validation: Examples, *, max_rows: int = MAX_ROWS) -> None:
        """Fit the calibration of every horizon to held-out rows, spread over all of them."""
        for horizon in range(1, self.horizon + 1):
            rows = validation.rows(horizon)
            rows = rows[:: max(1, len(rows) // max_rows)]
            window = window_of(
                validation, rows, context=self.context, hidden_layers=self.hidden_layers
            )
            used = validation.membership(rows + horizon - 1)
            self.calibration.fit(self.log_odds(window, horizon), used, horizon)


class ContextPredictor:
    """A ContextFamily following one sequence."""

    def __init__(self, family: ContextFamily) -> None:
        self.shape = family.shape
        self._family = family
        self._history = History(
            family.shape, context=family.context, hidden_layers=family.hidden_layers
        )

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._history.begin(prompt_ids)

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        if not 1 <= horizon <= self._family.horizon:
            return None
        window = self._history.window(token_id)
        scores = self.log_odds(window, horizon)
        probability = self._family.calibration.probability(scores, horizon)[0]
        step = self._history.step + horizon - 1
        return Forecast(step, 0, self.shape.num_moe_layers, probability)

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        """[1, L, E] of a window of one row, as the family's own."""
        return self._family.log_odds(window, horizon)

    def odds_of(self, forecast: Forecast) -> np.ndarray:
        """Log-odds [L, E] float32 of this predictor's newest forecast of horizon 1, contiguous."""
        return log_odds_of(forecast.probability)

    def in_pass(self, layer_idx: int, router_input: Tensor) -> None:
        return None

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: Tensor | None,
    ) -> None:
        self._history.observe(layer_idx, topk_ids, topk_weights, router_input)
