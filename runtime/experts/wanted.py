"""Forecasts held for moments to come, and the experts that they speak for.

Numbers and keys only; decides nothing.
"""

from collections.abc import Collection, Iterator

import numpy as np

from ...collect.schema import ExpertKey, ModelShape
from ...predictors.base import Forecast
from .price import ReadPrice


class Wanted(Collection[ExpertKey]):
    """Keys whose next use is forecast as likely enough to be read ahead, looked up when asked.

    `tables` holds the newest forecasts by step, [num_moe_layers, num_experts], 0 where there is
    none; `position` is the moment at which execution stands, one moment per MoE layer and step.
    """

    def __init__(self, shape: ModelShape, price: ReadPrice) -> None:
        self.tables: dict[int, np.ndarray] = {}
        self.position = -1
        self._shape = shape
        self._price = price

    def take(self, forecast: Forecast) -> bool:
        """Take the newest forecast for its layers and step; False if its moments have passed."""
        step, num_layers = forecast.step, self._shape.num_moe_layers
        if step * num_layers + forecast.layer_to - 1 <= self.position:
            return False
        table = self.tables.get(step)
        if table is None:
            size = (num_layers, self._shape.num_experts)
            table = self.tables[step] = np.zeros(size, np.float32)
        table[forecast.layer_from : forecast.layer_to] = forecast.probability
        return True

    def forget_before(self, step: int) -> None:
        """Forecasts for steps that have passed are let go."""
        # Their moments lie before `position`, so that nothing is wanted the less.
        for gone in [one for one in self.tables if one < step]:
            del self.tables[gone]

    def clear(self) -> None:
        """Nothing is forecast, and execution stands before everything."""
        self.tables.clear()
        self.position = -1

    def __contains__(self, key: object) -> bool:
        layer_idx, expert_idx = key  # type: ignore[misc]
        least, num_layers = self._price.least_probability, self._shape.num_moe_layers
        for step, table in self.tables.items():
            is_ahead = step * num_layers + layer_idx > self.position
            if is_ahead and table[layer_idx, expert_idx] >= least:
                return True
        return False

    def __iter__(self) -> Iterator[ExpertKey]:
        num_layers, num_experts = self._shape.num_moe_layers, self._shape.num_experts
        every = (ExpertKey(*pair) for pair in np.ndindex(num_layers, num_experts))
        return filter(self.__contains__, every)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        # Asked at each failed reserve, where counting would look at every expert of the model.
        return bool(self.tables)
