"""Forecasts by small networks, a native call each: one token, fp16 weights, sums in fp32.

Bindings of csrc/forecast.c and csrc/context.c. Descriptors go by the addresses of arrays, which
they keep alive and which must stay where they are. Knows arrays only; the plain mathematics is that
of the predictors, which compute it by themselves where `is_available` says no. A call blocks for no
longer than its products take, and the interpreter's lock is free meanwhile.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import native
from .native import DTYPE_IDS

MAX_HORIZON = 2

_pointer, _wide, _narrow, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@dataclass(frozen=True, slots=True)
class HalfLinear:
    """weight [out, in] fp16, contiguous, on the CPU; offset [out] float32 or None."""

    weight: Tensor
    offset: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight and offset float32 [width]."""

    weight: np.ndarray
    offset: np.ndarray
    eps: float


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("offset", _pointer), ("n", _wide), ("k", _wide))


class _Drift(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("inner", "up", "gate", "own")),
        *((name, _pointer) for name in ("bias", "of_drift", "of_odds", "alone")),
        *((name, _wide) for name in ("hidden_size", "num_experts", "depth", "top_k", "num_linear")),
        ("is_sigmoid", _narrow),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("offset", _pointer), ("eps", _real))


class _Block(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm),
        ("feed_norm", _Norm),
        *((name, _Linear) for name in ("query", "key_value", "out", "feed_in", "feed_out")),
        ("lag", _pointer),
        ("heads", _wide),
        ("context", _wide),
    )


class _Horizon(ctypes.Structure):
    _fields_ = (
        *(
            (name, _pointer)
            for name in ("keys", "totals", "steps", "cells", "transitions", "scale")
        ),
        ("head", _Linear),
        ("num_keys", _wide),
        ("strength", _real),
    )


class _Context(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("vocabulary", "cluster", "own", "past", "expert", "none")),
        ("frequencies", _pointer),
        ("states", _Linear),
        ("states_norm", _Norm),
        ("norm", _Norm),
        ("blocks", ctypes.POINTER(_Block)),
        ("horizons", _Horizon * MAX_HORIZON),
        *((name, _wide) for name in ("num_tokens", "num_blocks", "width", "num_layers")),
        *((name, _wide) for name in ("num_experts", "top_k", "num_clusters", "num_horizons")),
    )


def is_available() -> bool:
    """Whether the native calls are there."""
    return native.library() is not None


class _Kept:
    """Arrays that a descriptor points at, in the types that it expects."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def array(self, values: np.ndarray, dtype: type = np.float32) -> int:
        """The address of the values, which are kept."""
        held = np.ascontiguousarray(values, dtype)
        self.arrays.append(held)
        return held.ctypes.data

    def linear(self, layer: HalfLinear) -> _Linear:
        weight = layer.weight.detach().half().contiguous()
        self.arrays.append(weight)
        offset = None if layer.offset is None else self.array(layer.offset)
        return _Linear(weight.data_ptr(), offset, *weight.shape)

    def norm(self, norm: LayerNorm) -> _Norm:
        return _Norm(self.array(norm.weight), self.array(norm.offset), norm.eps)


class LayerForecast:
    """Later layers' probabilities from one layer's state; see `Drift` in csrc/forecast.c.

    `inner` [units, F], of whose units the first `num_linear` are linear; `up` and `gate` [D * E, .]
    of D later layers; `own` [E, H]. `bias` [D, E] or None; trust in the drift and in earlier odds,
    and in the drift without them, [D] each.
    """

    def __init__(
        self,
        *,
        inner: HalfLinear,
        up: HalfLinear,
        gate: HalfLinear,
        own: HalfLinear,
        bias: np.ndarray | None,
        of_drift: np.ndarray,
        of_odds: np.ndarray,
        alone: np.ndarray,
        top_k: int,
        num_linear: int,
        is_sigmoid: bool,
    ) -> None:
        kept = self._kept = _Kept()
        experts, size = own.weight.shape
        self._shape = len(of_drift), experts
        self._drift = _Drift(
            inner=kept.linear(inner),
            up=kept.linear(up),
            gate=kept.linear(gate),
            own=kept.linear(own),
            bias=None if bias is None else kept.array(bias),
            of_drift=kept.array(of_drift),
            of_odds=kept.array(of_odds),
            alone=kept.array(alone),
            hidden_size=size,
            num_experts=experts,
            depth=len(of_drift),
            top_k=top_k,
            num_linear=num_linear,
            is_sigmoid=is_sigmoid,
        )
        self._pointer = ctypes.byref(self._drift)
        self._call = native.loaded().outrider_forecast_layers

    def __call__(
        self,
        state: Tensor,
        *,
        kept: int,
        before: int | None,
        past: tuple[int, int] | tuple[None, None],
        odds: int | None,
    ) -> np.ndarray:
        """[D, E] float32. `state` [1, H] on the CPU in fp32, bf16 or fp16, its row contiguous.

        The others are addresses of float32 arrays or None: `kept` [H] takes the state; `before` and
        `past` [H] are other states, `odds` [D, E] log-odds.
        """
        out = np.empty(self._shape, np.float32)
        native.check_status(
            self._call(
                self._pointer,
                state.data_ptr(),
                before,
                *past,
                odds,
                kept,
                out.ctypes.data,
                DTYPE_IDS[state.dtype],
            )
        )
        return out


@dataclass(frozen=True, slots=True)
class EncoderBlock:
    """One pre-norm block; `lag` [heads, context]."""

    norm: LayerNorm
    feed_norm: LayerNorm
    query: HalfLinear
    key_value: HalfLinear
    out: HalfLinear
    feed_in: HalfLinear
    feed_out: HalfLinear
    lag: np.ndarray


@dataclass(frozen=True, slots=True)
class HorizonHead:
    """Counts of U ids: `keys` int64 [U] ascending, `totals`, `steps` [U], `cells` uint8 [U, L * E];
    `strength` of the back-off to `transitions` [L, E, E]; the corrections' head and `scale` [L].
    """

    keys: np.ndarray
    totals: np.ndarray
    steps: np.ndarray
    cells: np.ndarray
    strength: float
    transitions: np.ndarray
    head: HalfLinear
    scale: np.ndarray


class TokenForecast:
    """All layers' probabilities before a token; see `Context` in csrc/context.c.

    `vocabulary` int64 [V] ascending; `own` and `past` [1 + V, W], row 0 of unknown ids; `expert`
    [L * E, W]; `none` [W]; `cluster` [L, E] of `num_clusters`; `frequencies` [L, E].
    """

    def __init__(
        self,
        *,
        vocabulary: np.ndarray,
        own: np.ndarray,
        past: np.ndarray,
        expert: np.ndarray,
        none: np.ndarray,
        states: tuple[HalfLinear, LayerNorm] | None,
        blocks: Sequence[EncoderBlock],
        norm: LayerNorm,
        horizons: Sequence[HorizonHead],
        cluster: np.ndarray,
        num_clusters: int,
        frequencies: np.ndarray,
        top_k: int,
    ) -> None:
        kept = self._kept = _Kept()
        layers, experts = cluster.shape
        self._shape = len(horizons), layers, experts
        self._blocks = (_Block * max(1, len(blocks)))(*(_block(kept, one) for one in blocks))
        self._context = _Context(
            vocabulary=kept.array(vocabulary, np.int64),
            cluster=kept.array(cluster, np.int64),
            own=kept.array(own),
            past=kept.array(past),
            expert=kept.array(expert),
            none=kept.array(none),
            frequencies=kept.array(frequencies),
            norm=kept.norm(norm),
            blocks=self._blocks,
            horizons=(_Horizon * MAX_HORIZON)(*(_horizon(kept, one) for one in horizons)),
            num_tokens=len(vocabulary),
            num_blocks=len(blocks),
            width=len(none),
            num_layers=layers,
            num_experts=experts,
            top_k=top_k,
            num_clusters=num_clusters,
            num_horizons=len(horizons),
        )
        if states is not None:
            self._context.states = kept.linear(states[0])
            self._context.states_norm = kept.norm(states[1])
        self._pointer = ctypes.byref(self._context)
        self._call = native.loaded().outrider_forecast_token

    def __call__(
        self,
        token_id: int,
        *,
        past_id: int,
        topk_ids: np.ndarray,
        states: np.ndarray,
        has_past: bool,
        frames: np.ndarray,
        num_frames: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [horizons, L, E] and the first horizon's log-odds [L, E], float32.

        `topk_ids` int64 [L, k] and `states` float32 are the last token's, contiguous; `frames`
        float32 [num_frames or more, 3 * W] newest first, of which row 0 is written here.
        """
        out = np.empty(self._shape, np.float32)
        odds = np.empty(self._shape[1:], np.float32)
        native.check_status(
            self._call(
                self._pointer,
                topk_ids.ctypes.data,
                states.ctypes.data,
                frames.ctypes.data,
                out.ctypes.data,
                odds.ctypes.data,
                token_id,
                past_id,
                num_frames,
                has_past,
            )
        )
        return out, odds


def _block(kept: _Kept, block: EncoderBlock) -> _Block:
    heads, context = block.lag.shape
    return _Block(
        norm=kept.norm(block.norm),
        feed_norm=kept.norm(block.feed_norm),
        query=kept.linear(block.query),
        key_value=kept.linear(block.key_value),
        out=kept.linear(block.out),
        feed_in=kept.linear(block.feed_in),
        feed_out=kept.linear(block.feed_out),
        lag=kept.array(block.lag),
        heads=heads,
        context=context,
    )


def _horizon(kept: _Kept, one: HorizonHead) -> _Horizon:
    return _Horizon(
        keys=kept.array(one.keys, np.int64),
        totals=kept.array(one.totals),
        steps=kept.array(one.steps),
        cells=kept.array(one.cells, np.uint8),
        transitions=kept.array(one.transitions),
        scale=kept.array(one.scale),
        head=kept.linear(one.head),
        num_keys=len(one.keys),
        strength=one.strength,
    )
