"""Token statistics: what each token's id chose so far, backing off to what followed the last
token's experts, and those to each layer's frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..collect.schema import ModelShape
from .calibration import Calibration, inclusion, log_loss
from .checkpoint import take
from .context import MAX_ROWS, ContextFamily, Window, window_of
from .counts import CountTable
from .errors import PredictorError

if TYPE_CHECKING:
    from .examples import Examples
    from .journal import Journal
    from .presets import Settings

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Tokens that a back-off may weigh as much as; the best is chosen by held-out log loss."""

PRIOR_TOKENS = 8.0
_FLOOR = 1e-4


class Transitions:
    """Of each layer: the probability of each expert after a token that used another, [L, E, E].

    Shrunk towards the layer's frequencies by a prior of `PRIOR_TOKENS`.
    """

    def __init__(self, probability: np.ndarray) -> None:
        self.probability = probability
        self._layers = np.arange(len(probability))[:, None]

    @classmethod
    def count(cls, examples: Examples, *, lag: int) -> Self:
        """How the experts `lag` tokens later follow from those of a token, in one sample."""
        shape = examples.shape
        layers, experts = shape.num_moe_layers, shape.num_experts
        counts = np.zeros((layers, experts, experts), np.float32)
        totals = np.zeros((layers, experts), np.float32)
        first = np.flatnonzero(examples.remaining >= lag)
        for start in range(0, len(first), 8192):
            rows = first[start : start + 8192]
            before = examples.membership(rows).astype(np.float32).transpose(1, 2, 0)
            after = examples.membership(rows + lag).astype(np.float32).transpose(1, 0, 2)
            counts += before @ after
            totals += before.sum(axis=2)
        prior = PRIOR_TOKENS * examples.frequencies()[:, None, :]
        return cls((counts + prior) / (totals[:, :, None] + PRIOR_TOKENS))

    def after(self, topk_ids: np.ndarray) -> np.ndarray:
        """[N, L, E]: the mean over the experts [N, L, k] of a token."""
        return self.probability[self._layers, topk_ids].mean(axis=2)


class Statistics(ContextFamily):
    """P(expert | token id) with back-off; of both horizons, given the newest id that is known."""

    name = "statistics"

    def __init__(
        self,
        shape: ModelShape,
        *,
        frequencies: np.ndarray,
        tables: list[CountTable],
        transitions: list[Transitions],
        strengths: list[float],
    ) -> None:
        super().__init__(shape, frequencies=frequencies, context=1, horizon=len(tables))
        self.tables = tables
        self.transitions = transitions
        self.strengths = strengths

    @classmethod
    def fit(
        cls, examples: Examples, *, validation: Examples, settings: Settings, progress: Journal
    ) -> Self:
        tables, transitions, strengths = [], [], []
        for horizon in range(1, settings.horizon + 1):
            progress("counting", horizon - 1, settings.horizon)
            rows = np.flatnonzero(examples.remaining >= horizon - 1)
            events = examples.cells(rows + horizon - 1)
            tables.append(
                CountTable.count(
                    examples.token_id[rows], events, width=examples.shape.num_routed_experts
                )
            )
            transitions.append(Transitions.count(examples, lag=horizon))
            strengths.append(STRENGTHS[0])
        made = cls(
            examples.shape,
            frequencies=examples.frequencies(),
            tables=tables,
            transitions=transitions,
            strengths=strengths,
        )
        for horizon in range(1, settings.horizon + 1):
            made._choose_strength(validation, horizon)
        made.calibrate(validation)
        progress("counting", settings.horizon, settings.horizon)
        return made

    def log_odds(self, window: Window, horizon: int) -> np.ndarray:
        counts, totals = self.tables[horizon - 1].lookup(window.token_id)
        return self.blend(window, horizon, counts=counts, totals=totals)

    def log_odds_without(
        self, window: Window, horizon: int, *, cells: np.ndarray, in_table: np.ndarray
    ) -> np.ndarray:
        """As if the rows themselves had not been counted, for a net that learns to correct this.

        `cells` [N, L * k] are the flat experts that the targets used; `in_table` [N] is False for
        rows that were not counted.
        """
        counts, totals = self.tables[horizon - 1].lookup(window.token_id)
        own = in_table.astype(np.float32)
        rows = np.arange(len(cells))[:, None]
        counts[rows, cells] = np.maximum(counts[rows, cells] - own[:, None], 0.0)
        return self.blend(window, horizon, counts=counts, totals=np.maximum(totals - own, 0.0))

    def blend(
        self, window: Window, horizon: int, *, counts: np.ndarray, totals: np.ndarray
    ) -> np.ndarray:
        """Log-odds [N, L, E] of counts [N, L * E] out of `totals` [N] blended with the back-off."""
        assert self.frequencies is not None
        followed = self.transitions[horizon - 1].after(window.topk_ids[:, 0])
        if not window.length.all():
            followed[window.length == 0] = self.frequencies
        strength = self.strengths[horizon - 1]
        share = (counts.reshape(followed.shape) + strength * followed) / (
            totals[:, None, None] + strength
        )
        share = np.clip(share, _FLOOR, 1.0 - _FLOOR).astype(np.float32, copy=False)
        return np.log(share) - np.log1p(-share)

    @property
    def parameters(self) -> int:
        tables = sum(table.cells.size for table in self.tables)
        return tables + sum(one.probability.size for one in self.transitions)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert self.frequencies is not None
        tensors = {"frequencies": self.frequencies}
        for index, (table, transitions) in enumerate(
            zip(self.tables, self.transitions, strict=True)
        ):
            tensors |= table.state(f"statistics.{index + 1}")
            tensors[f"statistics.{index + 1}.transitions"] = transitions.probability
        config = {"strengths": self.strengths, "calibration": self.calibration.config()}
        return tensors, config

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: ModelShape
    ) -> Self:
        layers, experts = shape.num_moe_layers, shape.num_experts
        strengths = [float(value) for value in config["strengths"]]
        if not strengths or not all(value > 0 for value in strengths):
            raise PredictorError(f"strengths are {strengths}; expected numbers above 0")
        prefixes = [f"statistics.{index + 1}" for index in range(len(strengths))]
        square = (layers, experts, experts)
        made = cls(
            shape,
            frequencies=take(tensors, "frequencies", (layers, experts)),
            tables=[
                CountTable.from_state(tensors, prefix, width=layers * experts)
                for prefix in prefixes
            ],
            transitions=[
                Transitions(take(tensors, f"{prefix}.transitions", square)) for prefix in prefixes
            ],
            strengths=strengths,
        )
        made.calibration = Calibration.from_config(config, shape, horizon=len(strengths))
        return made

    def _choose_strength(
        self, validation: Examples, horizon: int, *, max_rows: int = MAX_ROWS
    ) -> None:
        rows = validation.rows(horizon)
        rows = rows[:: max(1, len(rows) // max_rows)]
        window = window_of(validation, rows, context=1)
        used = validation.membership(rows + horizon - 1)
        losses = []
        for strength in STRENGTHS:
            self.strengths[horizon - 1] = strength
            probability = inclusion(self.log_odds(window, horizon), self.shape.top_k)
            losses.append(float(log_loss(probability, used).mean()))
        self.strengths[horizon - 1] = STRENGTHS[int(np.argmin(losses))]
