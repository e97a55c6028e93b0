"""A widened model and the one it was widened from: whose routing it has, and whose predictors.

A checkpoint that was padded with zeros computes its source's function at other sizes
(`outrider bench make-geometry`). Its config.json says so; what a predictor of the source reads are
the first values of each state, the others being zero. Knows no predictor family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...collect.schema import ModelShape
from ...predictors.base import Forecast, Predictor
from ..errors import InvalidDataError

FIELD = "widened_from"
Gate = tuple[torch.Tensor, torch.Tensor | None]


def described(source: ModelShape) -> dict[str, Any]:
    """What config.json of a model widened from `source` says of it."""
    return {
        FIELD: {
            "hidden_size": source.hidden_size,
            "expert_size": source.expert_size,
            "fingerprint": source.fingerprint,
        }
    }


def trained_shape(config: Mapping[str, Any], shape: ModelShape) -> ModelShape:
    """The shape that predictors of the model `shape` were trained for: its own, or its source's.

    InvalidDataError where config.json names a source that cannot be one.
    """
    source = config.get(FIELD)
    if source is None:
        return shape
    try:
        hidden, expert, fingerprint = (
            int(source["hidden_size"]), int(source["expert_size"]), str(source["fingerprint"])
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataError(
            f"config.json: {FIELD} must hold hidden_size, expert_size and fingerprint: {error!r}"
        ) from error
    if not 1 <= hidden <= shape.hidden_size or not 1 <= expert <= shape.expert_size:
        raise InvalidDataError(
            f"config.json: {FIELD} names sizes {hidden} and {expert}, which are not within this "
            f"model's {shape.hidden_size} and {shape.expert_size}"
        )
    return replace(shape, hidden_size=hidden, expert_size=expert, fingerprint=fingerprint)


def narrowed_gates(gates: Sequence[Gate], size: int) -> list[Gate]:
    """The gates' columns that meet the first `size` values of a state."""
    return [(weight[:, :size].contiguous(), bias) for weight, bias in gates]


class Narrowed:
    """A predictor of the source on a widened model: shown the first `size` values of states."""

    def __init__(self, predictor: Predictor, shape: ModelShape, *, size: int) -> None:
        self.shape = shape
        self._predictor = predictor
        self._size = size

    def begin(self, prompt_ids: np.ndarray) -> None:
        self._predictor.begin(prompt_ids)

    def before_token(self, token_id: int, horizon: int) -> Forecast | None:
        return self._predictor.before_token(token_id, horizon)

    def in_pass(self, layer_idx: int, router_input: torch.Tensor) -> Forecast | None:
        return self._predictor.in_pass(layer_idx, router_input[:, : self._size])

    def observe(
        self,
        layer_idx: int,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        router_input: torch.Tensor | None,
    ) -> None:
        if router_input is not None:
            router_input = router_input[:, : self._size]
        self._predictor.observe(layer_idx, topk_ids, topk_weights, router_input)
