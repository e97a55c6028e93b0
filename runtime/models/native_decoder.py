"""The rows of a pass through a decoder of Llama's form, past transformers' own forward.

Through the modules a token spends a fifth of its time around the matrix products; here attention,
gated MLPs and norms are one native call each for all rows, and the experts' function is called as
the modules would call it. Rows of prompts go the kernels' way for many rows and decoded tokens that
for a few, however many of each there are; so a row's bits depend on its own text alone, not on what
else is in the pass, nor on the pieces a prompt is run in. Other families go through the model.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import decoder, native
from ...kernels.activation import ActivationError, canonical_activation
from ...kernels.decoder import Attention, GatedMlp, HeadNorm, Pasts, Projection, RmsNorm
from ...kernels.router import Router, gate_rows
from ...kernels.token_pass import PassLayer, TokenPass
from ...kernels.weights import ExpertWeights
from .attention import Span
from .dense import QuantizedLinear
from .llama_form import choice_rule, has_form, num_kv_heads, shared_experts

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TABLE_ROWS = 1024

# Told the ids [layers, T, K] that layers from `first_layer` on have chosen.
Record = Callable[..., None]
# Sees to one layer's experts: its index, the norm's output [T, H], its ids and weights [T, K].
Serve = Callable[[int, Tensor, np.ndarray, Tensor], Generator[None]]


class NativeDecoder:
    """The decoder of one loaded model on the CPU; make it with `of`. One thread; blocks."""

    def __init__(
        self,
        model: Any,
        layers: list[tuple[Attention, "_Block"]],
        norm: RmsNorm,
        head: Projection,
    ) -> None:
        inner = model.model
        self._layers = layers
        self._token_pass = TokenPass(
            [block.in_pass(attend) for attend, block in layers],
            embeddings=inner.embed_tokens.weight,
            norm=norm,
            head=head,
        )
        self._embeddings = inner.embed_tokens.weight
        self._rotary = inner.rotary_emb
        self._norm = norm
        self._head, self._vocab_size = decoder.product(head), head.shape[0]
        head_dim = inner.layers[0].self_attn.head_dim
        self._row = self._embeddings.new_empty(1, num_kv_heads(model.config), 0, head_dim)
        self._cosines = self._sines = self._embeddings.new_empty(0, head_dim)

    @classmethod
    def of(cls, model: Any) -> "NativeDecoder | None":
        """The decoder of `model`, its dense weights loaded, or None where it is not served.

        Served are models of the form on the CPU, all in one dtype, where the native library was
        built.
        """
        config = model.config
        is_plain = (
            has_form(model)
            and model.model.embed_tokens.weight.device.type == "cpu"
            and model.model.embed_tokens.weight.dtype in _FORMATS
        )
        if not is_plain or not native.is_available():
            return None
        try:
            dtype = model.model.embed_tokens.weight.dtype
            layers = [_layer(layer, config, dtype) for layer in model.model.layers]
            norm = _norm(model.model.norm, dtype)
            return cls(model, layers, norm, _projection(model.lm_head))
        except _NotServedError:
            return None

    def logits(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        *,
        num_streamed: int,
        rows: Sequence[int],
    ) -> Tensor:
        """Logits [len(rows), vocabulary] behind those rows of a pass, in the model's dtype.

        `spans` cover the rows of `token_ids` in order, first `num_streamed` rows of sequences that
        decode; keys and values have grown by them. Whatever is raised, no row then counts as part
        of the past.
        """
        self._have_turns(max(positions))
        at = torch.tensor(positions)
        cosines, sines = self._cosines.index_select(0, at), self._sines.index_select(0, at)
        pasts = self._pasts(spans, num_streamed)
        x = self._embeddings.index_select(0, torch.tensor(token_ids))  # [T, H], the residual stream
        for layer_idx, (attend, block) in enumerate(self._layers):
            attend(x, cosines, sines, pasts, layer_idx=layer_idx)
            block(x, num_streamed)
        logits = x.new_empty(0, self._vocab_size)
        if rows:
            if len(rows) < len(token_ids):
                x = x.index_select(0, torch.tensor(rows))
            streamed = sum(row < num_streamed for row in rows)
            logits = self._head(self._norm(x), len(rows), streamed)
        # Last, so that a pass that failed anywhere is run again from where it began.
        for span in spans:
            span.kv.advance(span.end - span.start)
        return logits

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        *,
        experts: ExpertWeights,
        slots: np.ndarray,
        record: Record,
        serve: Serve,
        serves_all: bool,
    ) -> Tensor:
        """`logits`, with its bits, of a pass in which every sequence decodes.

        slots [layers, E] int64, negative for experts that are in none. Layers that lack none of
        what they choose are computed without a word and `record`ed, in order; the others, or all,
        go to `serve`, as for `TokenPass`.
        """
        self._have_turns(max(positions))
        num_recorded = 0

        def told(
            layer_idx: int, normed: Tensor, ids: np.ndarray, weights: Tensor
        ) -> Generator[None]:
            nonlocal num_recorded
            if layer_idx > num_recorded:
                record(ids[num_recorded:layer_idx], first_layer=num_recorded)
            num_recorded = layer_idx + 1
            return serve(layer_idx, normed, ids[layer_idx], weights[layer_idx])

        logits, chosen = self._token_pass(
            token_ids,
            positions,
            (self._cosines, self._sines),
            self._pasts(spans, len(token_ids)),
            experts=experts,
            slots=slots,
            serve=told,
            serves_all=serves_all,
        )
        record(chosen[num_recorded:], first_layer=num_recorded)
        for span in spans:
            span.kv.advance(1)
        return logits

    def _pasts(self, spans: Sequence[Span], num_streamed: int) -> Pasts:
        num_layers = len(self._layers)
        table = np.empty((num_layers, len(spans), 6), dtype=np.int64)
        for place, span in enumerate(spans):
            num_rows = span.end - span.start
            addresses, capacity = span.kv.room(num_rows, num_layers=num_layers, like=self._row)
            table[:, place, :2] = addresses
            table[:, place, 2:] = (capacity, span.kv.length, span.start, num_rows)
        return Pasts(table, num_streamed=num_streamed)

    def _have_turns(self, position: int) -> None:
        if position < self._cosines.shape[0]:
            return
        # As the model computes it, for whole stretches of positions at once.
        num_rows = (position // _TABLE_ROWS + 1) * _TABLE_ROWS
        positions = torch.arange(num_rows)[None]
        cosines, sines = self._rotary(self._row, position_ids=positions)
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()


class _NotServedError(Exception):
    """A part that the native calls do not compute as it is."""


def _layer(layer: Any, config: Any, dtype: torch.dtype) -> tuple[Attention, "_Block"]:
    attention, norm = layer.self_attn, layer.input_layernorm
    if norm.weight.dtype != dtype:
        raise _NotServedError
    query, key, value, output = (
        _projection(module)
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    attend = Attention(
        (query, key, value, output),
        norm=norm.weight,
        eps=norm.variance_epsilon,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        window=getattr(config, "sliding_window", None),
        query_norm=_head_norm(attention, "q_norm"),
        key_norm=_head_norm(attention, "k_norm"),
    )
    return attend, _block(layer, config, dtype)


def _head_norm(attention: Any, name: str) -> HeadNorm | None:
    module = getattr(attention, name, None)
    return None if module is None else HeadNorm(module.weight, module.variance_epsilon)


def _projection(module: Any) -> Projection:
    if isinstance(module, QuantizedLinear):
        shape = (module.out_features, module.in_features)
        projection = Projection(module.parts, module.fmt, shape, module.bias)
    elif isinstance(module, torch.nn.Linear):
        projection = _plain(module.weight, module.bias)
    else:
        raise _NotServedError
    if not decoder.serves(projection):
        raise _NotServedError
    return projection


def _plain(weight: Tensor, bias: Tensor | None = None) -> Projection:
    if weight.dtype not in _FORMATS:
        raise _NotServedError
    shape = (weight.shape[0], weight.shape[1])
    return Projection({"weight": weight}, _FORMATS[weight.dtype], shape, bias)


def _norm(module: Any, dtype: torch.dtype) -> RmsNorm:
    if module.weight.dtype != dtype:
        raise _NotServedError
    return RmsNorm(module.weight, module.variance_epsilon)


def _mlp(module: Any, config: Any, dtype: torch.dtype) -> GatedMlp:
    try:
        activation = canonical_activation(config.hidden_act)
    except ActivationError as error:
        raise _NotServedError from error
    gate, up, down = (
        _projection(one) for one in (module.gate_proj, module.up_proj, module.down_proj)
    )
    return GatedMlp(gate, up, down, activation=activation, dtype=dtype)


def _block(layer: Any, config: Any, dtype: torch.dtype) -> "_Block":
    norm, module = _norm(layer.post_attention_layernorm, dtype), layer.mlp
    if hasattr(module, "gate_proj"):
        return _Dense(norm, _mlp(module, config, dtype))
    shared, gate = shared_experts(module)
    return _Moe(
        norm,
        module.experts,
        router=_router(module.gate, config),
        shared=None if shared is None else _mlp(shared, config, dtype),
        shared_gate=None if gate is None else _projection(gate),
    )


def _router(router: Any, config: Any) -> Router:
    weight = router.weight
    if weight.dtype not in _FORMATS:
        raise _NotServedError
    return Router(weight, choice_rule(router, config), fmt=_FORMATS[weight.dtype])


class _Dense:
    """A block that is one gated MLP."""

    def __init__(self, norm: RmsNorm, mlp: GatedMlp) -> None:
        self._norm, self._mlp = norm, mlp

    def __call__(self, x: Tensor, num_streamed: int) -> None:
        """Add the block's output to x [T, H], of which so many first rows are streamed."""
        decoder.add_residual(x, self._mlp(self._norm(x), num_streamed))

    def in_pass(self, attend: Attention) -> PassLayer:
        """The layer as a part of a `TokenPass`."""
        return PassLayer(attend, self._norm, self._mlp)


class _Moe:
    """A block of routed and shared experts; the shared run while routed ones are being read."""

    def __init__(
        self,
        norm: RmsNorm,
        experts: Any,
        *,
        router: Router,
        shared: GatedMlp | None,
        shared_gate: Projection | None,
    ) -> None:
        self._norm = norm
        self._router = router
        self._experts = experts
        self._shared = shared
        self._shared_gate = shared_gate
        self._gate = None if shared_gate is None else decoder.product(shared_gate)

    def in_pass(self, attend: Attention) -> PassLayer:
        """The layer as a part of a `TokenPass`."""
        return PassLayer(attend, self._norm, self._shared, self._router, self._shared_gate)

    def __call__(self, x: Tensor, num_streamed: int) -> None:
        """As `_Dense`."""
        normed = self._norm(x)
        logits = self._router.logits(normed, x.shape[0], num_streamed)
        weights, ids = self._router.choose(logits)
        experts = self._experts
        shared: list[Tensor] = []

        def run_shared() -> None:
            if self._shared is not None and not shared:
                shared.append(self._shared_output(self._shared, normed, num_streamed))

        experts.outrider_meanwhile = run_shared
        try:
            routed = experts.outrider_function(
                experts.outrider_layer_idx, experts, normed, ids, weights
            )
        finally:
            experts.outrider_meanwhile = None
        run_shared()
        decoder.add_residual(x, routed, *shared)

    def _shared_output(self, shared: GatedMlp, normed: Tensor, num_streamed: int) -> Tensor:
        output = shared(normed, num_streamed)
        if self._gate is not None:
            gate_rows(self._gate(normed, normed.shape[0], num_streamed), output)
        return output


_Block = _Dense | _Moe
