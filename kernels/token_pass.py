"""A pass of single tokens through all layers of a decoder in one native call.

It comes back within a layer only where an expert is in no slot, a router's choice is tied, or
somebody wants to know every choice. Each part computes as its own call does (`decoder`, `router`),
so the bits are the same. Knows matrices, keys and values, slots; no model.
"""

import ctypes
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import native
from .decoder import Attention, GatedMlp, Pasts, Projection, RmsNorm, described
from .native import DTYPE_IDS, Matrix
from .router import Router
from .ways import Way
from .weights import ExpertWeights

# Why a pass comes back before its end (csrc/outrider.h).
_TIED, _MISSING, _PENDING = 5, 6, 7

# What sees to a layer's experts: of which of the routed layers, the norm's output [T, H], all
# layers' ids and weights so far [L, T, K]. Called before any is computed, it begins to bring what
# is in no slot. Whenever it is advanced, and has blocked, more is. Closed when all is computed.
Serve = Callable[[int, Tensor, np.ndarray, Tensor], Generator[None]]


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
        ("embeddings", ctypes.c_void_p),
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
        ("cosine_table", ctypes.c_void_p),
        ("sine_table", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("is_tied", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("routed", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("is_done", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("assignments", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("num_routed", ctypes.c_int64),
        ("stage", ctypes.c_int32),
        ("tells_all", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


class _Room:
    """Where passes of so many rows leave what they compute, and the descriptor that says so."""

    def __init__(self, num_rows: int, routers: Sequence[Router], embeddings: Tensor) -> None:
        hidden, top_k = embeddings.shape[1], routers[0].top_k
        self.x, self.normed, routed, shared = embeddings.new_empty(4, num_rows, hidden)
        outputs = embeddings.new_empty(num_rows, top_k, hidden)
        self.turns = embeddings.new_empty(2, num_rows, 0)
        chosen = (len(routers), num_rows, top_k)
        self.ids, self.weights = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen)
        self.scores = torch.empty(num_rows, routers[0].num_experts)
        self.is_tied = torch.empty(num_rows, dtype=torch.int32)
        is_done, gate = np.empty((num_rows, top_k), np.uint8), np.empty(num_rows, np.int32)
        assignments = np.empty((3, num_rows, top_k), np.int64)
        self.inputs = np.empty((2, num_rows), np.int64)
        self._kept = (routed, shared, outputs, is_done, gate, assignments)
        self.tokens = _Tokens(
            token_ids=self.inputs[0].ctypes.data,
            positions=self.inputs[1].ctypes.data,
            x=self.x.data_ptr(),
            normed=self.normed.data_ptr(),
            ids=self.ids.data_ptr(),
            weights=self.weights.data_ptr(),
            scores=self.scores.data_ptr(),
            is_tied=self.is_tied.data_ptr(),
            outputs=outputs.data_ptr(),
            routed=routed.data_ptr(),
            shared=shared.data_ptr(),
            is_done=is_done.ctypes.data,
            gate=gate.ctypes.data,
            assignments=assignments.ctypes.data,
            num_rows=num_rows,
        )

    def have_turns(self, dim: int) -> None:
        """Room for cosines and sines of that many values a row."""
        if self.turns.shape[2] != dim:
            self.turns = self.x.new_empty(2, self.x.shape[0], dim)
            self.tokens.cosines = self.turns[0].data_ptr()
            self.tokens.sines = self.turns[1].data_ptr()


class TokenPass:
    """Embeddings [V, H], the layers, the last norm and the head. Every router has the same `top_k`
    and number of experts. One thread; keeps memory for the largest pass so far.
    """

    def __init__(
        self,
        layers: Sequence[PassLayer],
        *,
        embeddings: Tensor,
        norm: RmsNorm,
        head: Projection,
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
            embeddings=embeddings.data_ptr(),
            norm=norm.weight.data_ptr(),
            head=described(head),
            num_layers=len(layers),
            eps=norm.eps,
            format=DTYPE_IDS[embeddings.dtype],
        )
        self._kept = (layers, gates, norm, head)
        self._embeddings, self._vocab_size = embeddings, head.shape[0]
        self._rooms: dict[int, _Room] = {}
        self._experts: ExpertWeights | None = None
        self._experts_address = 0
        self._call = native.loaded().outrider_decode

    def __call__(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        turns: tuple[Tensor, Tensor],
        pasts: Pasts,
        *,
        experts: ExpertWeights,
        slots: np.ndarray,
        serve: Serve,
        serves_all: bool,
    ) -> tuple[Tensor, np.ndarray]:
        """The next token of each of T sequences -> logits [T, V], ids [L, T, K] of routed layers.

        `turns` are cosines and sines [positions, head_dim] of all positions; `pasts` as for
        `Attention`, all streamed; slots [L, E] int64, negative for an expert that is in none: its
        layer goes to `serve`, or all layers do (`serves_all`); it may change them. The ids are
        overwritten by the next pass of T rows.
        """
        num_rows = len(token_ids)
        room = self._rooms.get(num_rows)
        if room is None:
            room = _Room(num_rows, self._routers, self._embeddings)
            self._rooms[num_rows] = room
        room.inputs[0], room.inputs[1] = token_ids, positions
        room.have_turns(turns[0].shape[1])
        tokens, logits = room.tokens, room.x.new_empty(num_rows, self._vocab_size)
        tokens.logits = logits.data_ptr()
        if experts is not self._experts:
            self._experts = experts
            self._experts_address = ctypes.addressof(native.experts_of(experts))
        tokens.experts = self._experts_address
        tokens.slots = slots.ctypes.data
        tokens.cosine_table, tokens.sine_table = turns[0].data_ptr(), turns[1].data_ptr()
        tokens.pasts = pasts.part(0, Way.STREAMED)[0]
        tokens.num_threads = torch.get_num_threads()
        tokens.layer, tokens.num_routed, tokens.stage = -1, 0, 0
        tokens.tells_all = serves_all
        decoder, state = ctypes.byref(self._decoder), ctypes.byref(tokens)
        ids, serving = room.ids.numpy(), None
        try:
            while status := self._call(decoder, state):
                if status == _PENDING:
                    assert serving is not None, "a pass waits for experts that nobody was asked for"
                    next(serving)
                    continue
                if serving is not None:
                    serving.close()
                    serving = None
                at = tokens.num_routed
                if status == _MISSING:
                    serving = serve(at, room.normed, ids, room.weights)
                    next(serving)
                elif status == _TIED:
                    self._routers[at].settle(room.scores, room.is_tied, room.ids[at])
                else:
                    native.check_status(status)
        finally:
            if serving is not None:
                serving.close()
        return logits, ids
