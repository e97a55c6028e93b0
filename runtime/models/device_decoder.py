"""Decoded tokens through a decoder of Llama's form on a device, past transformers' own forward.

A token there is hundreds of small kernels, which Python launches slower than a device computes
them. So they are recorded once for every number of rows: a segment up to each router's choice, the
shared experts, the routed ones. Where an expert may be missing the host looks at each choice, has
what is missing brought, and goes on; where none can be, it does not wait before the end. What
changes from token to token (positions, keys and values, slots) the kernels read from device memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.choice import choose
from ...kernels.cuda import MAX_GATHERED_TOKENS
from ...kernels.decode_attention import DevicePasts, attend
from ...kernels.expert_mlp import combine, expert_outputs
from ...kernels.gathered import gated_rows, matrix_rows
from ...kernels.operands import Operand
from ...kernels.residual_norm import residual_norm
from ...kernels.weights import ExpertWeights
from ..layer_choice import LayerChoice
from .attention import SequenceKv, Span
from .cuda_graphs import Work, WorkQueue
from .device_layers import (
    AttentionBlock,
    DeviceLayer,
    Mlp,
    Norm,
    NotServedError,
    Routed,
    layer_of,
    norm_of,
    stacked,
)
from .llama_form import has_form

MAX_ROWS = MAX_GATHERED_TOKENS
"""Rows of a pass; above, experts are better read once for all rows that go to them."""

_TABLE_ROWS = 4096
# A longer text makes the table anew, and whatever reads it is then recorded anew.
_MAX_FIRST_ROWS = 32768


class Experts(Protocol):
    """Who has experts brought: `executor.ExpertExecutor`."""

    @property
    def device_weights(self) -> ExpertWeights | None: ...

    @property
    def expects_no_miss(self) -> bool: ...

    @property
    def wants_states(self) -> bool: ...

    def slots(self) -> np.ndarray: ...

    def record(self, topk_ids: np.ndarray, *, first_layer: int) -> None: ...

    def serve_at_once(
        self, layer_idx: int, module: Any, choice: LayerChoice, *, compute: Callable[[], None]
    ) -> Tensor | None: ...


class DeviceDecoder:
    """The decoder of one loaded model on a device; make it with `of`. One thread.

    Serves passes of up to `MAX_ROWS` rows in which every sequence decodes. A row's bits depend on
    its own text alone, whatever else is in the pass and wherever experts lie.
    """

    def __init__(
        self, model: Any, layers: list[DeviceLayer], norm: Norm, head: Operand, queue: WorkQueue
    ) -> None:
        inner = model.model
        self.layers, self.norm, self.head = layers, norm, head
        self.embeddings = inner.embed_tokens.weight
        self.vocab_size = model.lm_head.out_features
        self._rotary = inner.rotary_emb
        length = getattr(model.config, "max_position_embeddings", None) or 0
        self._first_rows = min(length, _MAX_FIRST_ROWS)
        self._queue = queue
        self._row = self.embeddings.new_empty(
            1, layers[0].attention.heads.num_kv_heads, 0, layers[0].attention.heads.head_dim
        )
        self.turns = (self.embeddings.new_empty(0, 0),) * 2
        self._weights: ExpertWeights | None = None
        self._passes: dict[int, _Pass] = {}

    @classmethod
    def of(cls, model: Any, queue: WorkQueue) -> "DeviceDecoder | None":
        """The decoder of `model`, its dense weights loaded, or None where it is not served.

        The model's linear layers of the same inputs become views of one matrix.
        """
        if not has_form(model):
            return None
        try:
            layers = [layer_of(layer, model.config) for layer in model.model.layers]
            return cls(model, layers, norm_of(model.model.norm), stacked(model.lm_head), queue)
        except NotServedError:
            return None

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        *,
        experts: Experts,
    ) -> Tensor:
        """Logits [T, vocabulary] behind one token of each sequence, in the model's dtype.

        Keys and values have grown by it. Raises what `experts` raises; no row then counts as part
        of the past. The logits are overwritten by the next pass of T rows.
        """
        weights = experts.device_weights
        assert weights is not None
        one = self._pass_of(token_ids, positions, spans, weights)
        one.take(token_ids, positions, self._pasts(spans))
        logits = one.run(experts)
        for span in spans:
            span.kv.advance(1)
        return logits

    @torch.inference_mode()
    def prepare(self, weights: ExpertWeights) -> None:
        """Record passes of one row, so that no request waits for it.

        Blocks for a second, or for as many as it takes to compile kernels that were never compiled.
        """
        self._pass_of([0], [0], [Span(SequenceKv(), 0, 1)], weights)

    def _pass_of(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        weights: ExpertWeights,
    ) -> "_Pass":
        """The recorded pass of so many rows; recorded with these where it was not."""
        self._have_turns(max(positions))
        if weights is not self._weights:
            self._weights, self._passes = weights, {}
        one = self._passes.get(len(token_ids))
        if one is None:
            one = _Pass(self, weights, self._queue, num_rows=len(token_ids))
            one.take(token_ids, positions, self._pasts(spans))
            one.record()
            self._passes[len(token_ids)] = one
        return one

    def _pasts(self, spans: Sequence[Span]) -> np.ndarray:
        num_layers = len(self.layers)
        pasts = np.empty((len(spans), 2 + 2 * num_layers), np.int64)
        for place, span in enumerate(spans):
            addresses, capacity = span.kv.room(1, num_layers=num_layers, like=self._row)
            pasts[place, :2] = (span.kv.length, capacity)
            pasts[place, 2:] = addresses.reshape(-1)
        return pasts

    def _have_turns(self, position: int) -> None:
        if position < self.turns[0].shape[0]:
            return
        # As the model computes it, for whole stretches of positions at once.
        num_rows = max((position // _TABLE_ROWS + 1) * _TABLE_ROWS, self._first_rows)
        places = torch.arange(num_rows, device=self.embeddings.device)[None]
        cosines, sines = self._rotary(self._row, position_ids=places)
        self.turns = (cosines[0].contiguous(), sines[0].contiguous())
        self._passes = {}  # what was recorded reads the table that was


class _Pass:
    """The recorded work of passes of `num_rows` rows, and the tensors that outlive its pieces."""

    def __init__(
        self, decoder: DeviceDecoder, weights: ExpertWeights, queue: WorkQueue, *, num_rows: int
    ) -> None:
        self._decoder, self._weights, self._queue = decoder, weights, queue
        like, device = decoder.embeddings, decoder.embeddings.device
        num_layers, hidden = len(decoder.layers), like.shape[1]
        self._routed = [one.routed for one in decoder.layers if one.routed is not None]
        num_routed, top_k = len(self._routed), self._routed[0].rule.top_k
        num_experts = self._routed[0].router.weight.shape[-2]

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # What one copy brings to the device: ids, positions, lengths, capacities, addresses.
        self._inputs = integers(num_rows * (4 + 2 * num_layers))
        self._host_inputs = queue.host_like(self._inputs)
        ids, positions, lengths, capacities, addresses = self._inputs.split(
            [num_rows] * 4 + [num_rows * 2 * num_layers]
        )
        self._token_ids = ids
        self._pasts = DevicePasts(
            positions, lengths, capacities, addresses.view(num_layers, num_rows, 2)
        )
        self._slots = integers(num_routed, num_experts)
        self._host_slots = queue.host_like(self._slots)
        self._host_slots.zero_()
        self._ids = integers(num_routed, num_rows, top_k)
        self._host_ids = queue.host_like(self._ids)
        self._topk_weights = torch.zeros(num_routed, num_rows, top_k, device=device)
        self._host_weights = queue.host_like(self._topk_weights)
        self._x, self._normed, self._attended, self._routed_sum, self._mlp_sum = (
            like.new_zeros(num_rows, hidden) for _ in range(5)
        )
        self._host_states = [queue.host_like(self._normed) for _ in range(2)]
        self._logits = like.new_zeros(num_rows, decoder.vocab_size)
        self._rows = torch.arange(num_rows, device=device)
        self._first = torch.zeros_like(self._rows)
        self._token_idx = self._rows.repeat_interleave(top_k)
        self._segments: list[Work] = []
        self._shared: list[Work | None] = []
        self._experts: list[Work] = []

    def take(self, token_ids: Sequence[int], positions: Sequence[int], pasts: np.ndarray) -> None:
        """What the next pass is of; `pasts` [T, 2 + 2 L]: length, capacity, addresses."""
        inputs = self._host_inputs.numpy()
        addresses = pasts[:, 2:].reshape(len(pasts), -1, 2).transpose(1, 0, 2)
        np.concatenate(
            [token_ids, positions, pasts[:, 0], pasts[:, 1], addresses.reshape(-1)], out=inputs
        )
        self._inputs.copy_(self._host_inputs, non_blocking=True)

    def record(self) -> None:
        """Run every piece once, with the inputs taken, and record it."""
        num_routed = len(self._routed)
        segments = [lambda place=place: self._segment(place) for place in range(num_routed + 1)]
        experts = [lambda place=place: self._compute(place) for place in range(num_routed)]
        shared = [
            None if mlp is None else (lambda mlp=mlp: self._apply(mlp))
            for mlp in (one.mlp for one in self._decoder.layers if one.routed is not None)
        ]
        for place in range(num_routed):
            for work in (segments[place], shared[place], experts[place]):
                if work is not None:
                    work()
        segments[-1]()
        self._segments = [self._queue.recorded(work) for work in segments]
        self._experts = [self._queue.recorded(work) for work in experts]
        self._shared = [work and self._queue.recorded(work) for work in shared]

    def run(self, experts: Experts) -> Tensor:
        """The pass over what was taken -> logits [T, V]."""
        if not (experts.expects_no_miss and self._run_at_once(experts)):
            self._run_by_layer(experts)
        return self._logits

    def _run_at_once(self, experts: Experts) -> bool:
        """All layers without a look between them; whether none lacked an expert.

        A layer that did, and all behind it, computed with whatever lay in slot 0: the pass is to be
        run again, and writes over all of it. Nothing moves into a slot meanwhile, since only this
        thread lets experts go.
        """
        slots = experts.slots()
        self._send(np.maximum(slots, 0), slice(None))
        for place in range(len(self._routed)):
            self._segments[place]()
            self._launch_shared(place)
            self._experts[place]()
        self._segments[-1]()
        self._queue.mark()
        self._queue.wait()
        ids = self._host_ids.numpy()
        if np.take_along_axis(slots, ids.reshape(len(slots), -1), axis=1).min() < 0:
            return False
        experts.record(ids, first_layer=0)
        return True

    def _run_by_layer(self, experts: Experts) -> None:
        self._go(0, experts)
        for place, routed in enumerate(self._routed):
            self._queue.wait()
            choice = LayerChoice(
                ids=self._host_ids[place].numpy(),
                weights=self._host_weights[place],
                states=self._host_states[place % 2],
                hidden_states=self._normed,
                topk_ids=self._ids[place],
                topk_weights=self._topk_weights[place],
            )

            def compute(place: int = place) -> None:
                self._send(experts.slots()[place], place)
                self._experts[place]()
                self._go(place + 1, experts)

            in_waves = experts.serve_at_once(place, routed.module, choice, compute=compute)
            if in_waves is not None:
                self._routed_sum.copy_(in_waves)
                self._go(place + 1, experts)
        # What a pass takes ends with it, the last layer's waits for experts included.
        self._queue.mark()
        self._queue.wait()

    def _go(self, place: int, experts: Experts) -> None:
        """On to the choice of routed layer `place`, or to the end.

        Whoever forecasts of the layer before has the device work meanwhile, and the states that the
        host looks at are of two layers in turn.
        """
        self._segments[place]()
        if place == len(self._routed):
            return
        if experts.wants_states:
            self._host_states[place % 2].copy_(self._normed, non_blocking=True)
        self._queue.mark()
        # The device has something to do while the host looks.
        self._launch_shared(place)

    def _launch_shared(self, place: int) -> None:
        shared = self._shared[place]
        if shared is not None:
            shared()

    def _send(self, slots: np.ndarray, layers: int | slice) -> None:
        """Have the device know where the experts of `layers` lie."""
        sent = self._host_slots.numpy()[layers]
        if not np.array_equal(sent, slots):
            # Its last copy is over: the host has waited for the device since.
            sent[...] = slots
            self._slots[layers].copy_(self._host_slots[layers], non_blocking=True)

    def _segment(self, place: int) -> None:
        """From behind routed layer `place` - 1 to the choice of layer `place`, or to the logits."""
        decoder, added = self._decoder, (self._routed_sum, self._mlp_sum)
        routed_at = [i for i, one in enumerate(decoder.layers) if one.routed is not None]
        begin = 0 if place == 0 else routed_at[place - 1] + 1
        if place == 0:
            torch.index_select(decoder.embeddings, 0, self._token_ids, out=self._x)
            added = ()
        elif decoder.layers[begin - 1].mlp is None:
            added = (self._routed_sum,)
        for layer_idx in range(begin, len(decoder.layers)):
            layer = decoder.layers[layer_idx]
            self._attend(layer.attention, layer_idx, added)
            self._norm(layer.norm, (self._attended,))
            if layer.routed is not None:
                self._choose(layer.routed, place)
                return
            assert layer.mlp is not None
            self._apply(layer.mlp)
            added = (self._mlp_sum,)
        self._norm(decoder.norm, added)
        matrix_rows(self._normed, decoder.head, out=self._logits)

    def _norm(self, norm: Norm, added: tuple[Tensor, ...]) -> None:
        residual_norm(self._x, added, norm.weight, norm.eps, out=self._normed)

    def _attend(self, layer: AttentionBlock, layer_idx: int, added: tuple[Tensor, ...]) -> None:
        self._norm(layer.norm, added)
        heads, num_rows = layer.heads, self._x.shape[0]
        width = heads.num_heads * heads.head_dim
        qkv = self._x.new_empty(num_rows, width + 2 * heads.num_kv_heads * heads.head_dim)
        matrix_rows(self._normed, layer.qkv, out=qkv)
        seen = self._x.new_empty(num_rows, width)
        attend(qkv, heads, self._pasts, self._decoder.turns, layer_idx=layer_idx, out=seen)
        matrix_rows(seen, layer.output, out=self._attended)

    def _apply(self, mlp: Mlp) -> None:
        inner = gated_rows(
            self._normed,
            self._rows,
            self._first,
            mlp.gate_up,
            inner=mlp.inner,
            activation=mlp.activation,
            is_concatenated=True,
        )
        matrix_rows(inner, mlp.down, out=self._mlp_sum)
        if mlp.gate is not None:
            gate = self._x.new_empty(self._x.shape[0], 1)
            matrix_rows(self._normed, mlp.gate, out=gate)
            self._mlp_sum.mul_(torch.sigmoid(gate))

    def _choose(self, routed: Routed, place: int) -> None:
        num_experts = self._slots.shape[1]
        logits = self._x.new_empty(self._x.shape[0], num_experts)
        matrix_rows(self._normed, routed.router, out=logits)
        choose(logits, routed.rule, ids=self._ids[place], weights=self._topk_weights[place])
        self._host_ids[place].copy_(self._ids[place], non_blocking=True)
        self._host_weights[place].copy_(self._topk_weights[place], non_blocking=True)

    def _compute(self, place: int) -> None:
        """The routed experts of a layer, by the slots sent."""
        ids = self._ids[place]
        slots = torch.index_select(self._slots[place], 0, ids.view(-1))
        rows = expert_outputs(self._normed, (self._token_idx, slots), self._weights, impl="triton")
        self._routed_sum.copy_(
            combine(rows.view(*ids.shape, -1), self._topk_weights[place], ids, impl="triton")
        )
