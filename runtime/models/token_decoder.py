"""One token of one sequence through a decoder of Llama's form, past transformers' own forward.

Through the modules a token spends a fifth of its time around the matrix products; here attention,
dense MLPs and norms are one native call each, and routers and experts are called as the modules
would call them. Longer passes go through the model itself, as does any family not named here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels import token
from ...kernels.activation import ActivationError, canonical_activation
from ...kernels.token import HeadNorm, Projection, RmsNorm, TokenAttention, TokenMlp
from .attention import SequenceKv
from .deepseek import DeepseekMLP, DeepseekMoE
from .dense import QuantizedLinear

# Families whose decoder layers are norm, attention, residual, norm, block, residual, with rotary
# heads; each is compared with transformers' own forward in the tests.
FAMILIES = frozenset({"deepseek", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
# Rotary frequencies that do not change with the length of the text.
_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TABLE_ROWS = 1024

Block = Callable[[Tensor], None]


class TokenDecoder:
    """The decoder of one loaded model on the CPU; make it with `of`. One thread; blocks."""

    def __init__(
        self, model: Any, layers: list[tuple[int, TokenAttention, Block]], norm: RmsNorm
    ) -> None:
        inner = model.model
        self._layers = layers
        self._embeddings = inner.embed_tokens.weight
        self._rotary = inner.rotary_emb
        self._norm = norm
        self._head = model.lm_head
        head_dim = inner.layers[0].self_attn.head_dim
        self._row = self._embeddings.new_empty(1, _num_kv_heads(model.config), 0, head_dim)
        self._cosines = self._sines = self._embeddings.new_empty(0, head_dim)

    @classmethod
    def of(cls, model: Any) -> "TokenDecoder | None":
        """The decoder of `model`, its dense weights loaded, or None where it is not served.

        Served are families of `FAMILIES` on the CPU, all in one dtype, without clipped queries
        or a sliding window of some layers only, and where the native library was built.
        """
        config = model.config
        rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
        is_plain = (
            config.model_type in FAMILIES
            and getattr(rotary, "rope_type", None) in _FIXED_ROTARY
            and (config.model_type == "mixtral" or not getattr(config, "sliding_window", None))
            and not getattr(config, "clip_qkv", None)
            and model.model.embed_tokens.weight.device.type == "cpu"
            and model.model.embed_tokens.weight.dtype in _FORMATS
        )
        if not is_plain or not token.is_available():
            return None
        try:
            dtype = model.model.embed_tokens.weight.dtype
            layers = [_layer(layer, config, dtype) for layer in model.model.layers]
            return cls(model, layers, _norm(model.model.norm, dtype))
        except _NotServedError:
            return None

    def logits(self, token_id: int, position: int, kv: SequenceKv) -> Tensor:
        """The next token's logits [1, vocabulary] in the model's dtype; `kv` has grown by one row.

        Raises what the experts' function raises; the row then does not count as part of the past.
        """
        if position >= self._cosines.shape[0]:
            self._extend_table(position)
        cosine, sine = self._cosines[position], self._sines[position]
        x = self._embeddings[token_id : token_id + 1].clone()  # [1, H], the residual stream
        for layer_idx, attend, block in self._layers:
            keys, values = kv.room_for_one(layer_idx, like=self._row)
            attend(x, cosine, sine, keys, values, kv.length)
            block(x)
        kv.advance(1)
        return self._head(self._norm(x))

    def _extend_table(self, position: int) -> None:
        # As the model computes it, for whole stretches of positions at once.
        num_rows = (position // _TABLE_ROWS + 1) * _TABLE_ROWS
        positions = torch.arange(num_rows)[None]
        cosines, sines = self._rotary(self._row, position_ids=positions)
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()


class _NotServedError(Exception):
    """A part that the native calls do not compute as it is."""


def _layer(layer: Any, config: Any, dtype: torch.dtype) -> tuple[int, TokenAttention, Block]:
    attention, norm = layer.self_attn, layer.input_layernorm
    if norm.weight.dtype != dtype:
        raise _NotServedError
    query, key, value, output = (
        _projection(module)
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    attend = TokenAttention(
        (query, key, value, output),
        norm=norm.weight,
        eps=norm.variance_epsilon,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        window=getattr(config, "sliding_window", None),
        query_norm=_head_norm(attention, "q_norm"),
        key_norm=_head_norm(attention, "k_norm"),
    )
    return attention.layer_idx, attend, _block(layer, config, dtype)


def _num_kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_norm(attention: Any, name: str) -> HeadNorm | None:
    module = getattr(attention, name, None)
    return None if module is None else HeadNorm(module.weight, module.variance_epsilon)


def _projection(module: Any) -> Projection:
    shape = (module.out_features, module.in_features)
    if isinstance(module, QuantizedLinear):
        projection = Projection(module.parts, module.fmt, shape, module.bias)
    elif isinstance(module, torch.nn.Linear) and module.weight.dtype in _FORMATS:
        parts = {"weight": module.weight}
        projection = Projection(parts, _FORMATS[module.weight.dtype], shape, module.bias)
    else:
        raise _NotServedError
    if not token.serves(projection):
        raise _NotServedError
    return projection


def _norm(module: Any, dtype: torch.dtype) -> RmsNorm:
    if module.weight.dtype != dtype:
        raise _NotServedError
    return RmsNorm(module.weight, module.variance_epsilon)


def _mlp(module: Any, config: Any, dtype: torch.dtype) -> TokenMlp:
    try:
        activation = canonical_activation(config.hidden_act)
    except ActivationError as error:
        raise _NotServedError from error
    gate, up, down = (
        _projection(one) for one in (module.gate_proj, module.up_proj, module.down_proj)
    )
    return TokenMlp(gate, up, down, activation=activation, dtype=dtype)


def _block(layer: Any, config: Any, dtype: torch.dtype) -> Block:
    norm, module = _norm(layer.post_attention_layernorm, dtype), layer.mlp
    if isinstance(module, DeepseekMLP):
        mlp = _mlp(module, config, dtype)
        return lambda x: token.add_residual(x, mlp(norm(x)))
    if isinstance(module, DeepseekMoE):
        shared = module.shared_experts
        return _Moe(norm, module, None if shared is None else _mlp(shared, config, dtype))
    return lambda x: token.add_residual(x, module(norm(x)[None])[0])


class _Moe:
    """A block of routed and shared experts; the shared run while routed ones are being read."""

    def __init__(self, norm: RmsNorm, module: DeepseekMoE, shared: TokenMlp | None) -> None:
        self._norm = norm
        self._router: Any = module.gate
        self._experts: Any = module.experts
        self._shared = shared
        self._normed: Tensor = torch.empty(0)
        self._shared_output: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        experts = self._experts
        self._normed, self._shared_output = self._norm(x), None
        _, topk_weights, topk_ids = self._router(self._normed)
        experts.outrider_meanwhile = self._run_shared
        try:
            routed = experts.outrider_function(
                experts.outrider_layer_idx, experts, self._normed, topk_ids, topk_weights
            )
        finally:
            experts.outrider_meanwhile = None
        self._run_shared()
        token.add_residual(x, routed, self._shared_output)

    def _run_shared(self) -> None:
        if self._shared is not None and self._shared_output is None:
            self._shared_output = self._shared(self._normed)
