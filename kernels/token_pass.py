"""A pass of single tokens through all layers of a decoder in one native call.

For models whose experts are all in slots: nothing is to be asked between two layers then. Each part
computes as its own call does (`decoder`, `router`), so the bits are the same. Knows matrices, keys
and values, slots; no model.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import native
from .decoder import Attention, GatedMlp, Pasts, Projection, RmsNorm, described
from .native import DTYPE_IDS, Matrix
from .router import IS_TIED, Router
from .ways import Way
from .weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class PassLayer:
    """Attention, the norm behind it, and a block: `mlp` alone where there is no router, else routed
    experts and, where there is one, `mlp` beside them, behind `shared_gate` if it has a gate.
    """

    attention: Attention
    norm: RmsNorm
    mlp: GatedMlp | None
    router: Router | None = None
    shared_gate: Projection | None = None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention", ctypes.c_void_p),
        ("mlp", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
        ("shared_gate", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
        ("num_layers", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("format", ctypes.c_int32),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("pasts", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("is_tied", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("num_routed", ctypes.c_int64),
        ("is_chosen", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


class TokenPass:
    """The layers, the last norm and the head. Every router has the same `top_k` and experts."""

    def __init__(
        self, layers: Sequence[PassLayer], *, norm: RmsNorm, head: Projection, dtype: torch.dtype
    ) -> None:
        gates = [one.shared_gate and described(one.shared_gate) for one in layers]
        self._routers = [one.router for one in layers if one.router is not None]
        self._described = (_Layer * len(layers))(
            *(
                _Layer(
                    attention=ctypes.addressof(one.attention.descriptor),
                    mlp=one.mlp and ctypes.addressof(one.mlp.descriptor),
                    router=one.router and ctypes.addressof(one.router.descriptor),
                    shared_gate=gate and ctypes.addressof(gate),
                    norm=one.norm.weight.data_ptr(),
                    eps=one.norm.eps,
                )
                for one, gate in zip(layers, gates, strict=True)
            )
        )
        self._decoder = _Decoder(
            layers=ctypes.addressof(self._described),
            norm=norm.weight.data_ptr(),
            head=described(head),
            num_layers=len(layers),
            eps=norm.eps,
            format=DTYPE_IDS[dtype],
        )
        self._kept = (layers, gates, norm, head)
        self._vocab_size = head.shape[0]
        self._call = native.loaded().outrider_decode

    def __call__(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        pasts: Pasts,
        *,
        experts: ExpertWeights,
        slots: np.ndarray,
    ) -> tuple[Tensor, np.ndarray]:
        """x [T, H], a token's embedding of each of T sequences -> logits [T, V], ids [L, T, K].

        x becomes what the last norm gets; cosines and sines [T, head_dim]; `pasts` as for
        `Attention`, all streamed; slots [L, E] int64, where each routed layer's experts lie.
        """
        num_rows, router = x.shape[0], self._routers[0]
        chosen = (len(self._routers), num_rows, router.top_k)
        normed, logits = torch.empty_like(x), x.new_empty(num_rows, self._vocab_size)
        ids, weights = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen)
        scores = torch.empty(num_rows, router.num_experts)
        is_tied = torch.empty(num_rows, dtype=torch.int32)
        tokens = _Tokens(
            experts=ctypes.addressof(native.experts_of(experts)),
            slots=slots.ctypes.data,
            pasts=pasts.part(0, Way.STREAMED)[0],
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            x=x.data_ptr(),
            normed=normed.data_ptr(),
            logits=logits.data_ptr(),
            ids=ids.data_ptr(),
            weights=weights.data_ptr(),
            scores=scores.data_ptr(),
            is_tied=is_tied.data_ptr(),
            num_rows=num_rows,
            num_threads=torch.get_num_threads(),
        )
        decoder, state = ctypes.byref(self._decoder), ctypes.byref(tokens)
        while (status := self._call(decoder, state)) == IS_TIED:
            router.settle(scores, is_tied, ids[tokens.num_routed])
        native.check_status(status)
        return logits, ids.numpy()
