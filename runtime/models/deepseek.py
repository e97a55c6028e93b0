"""DeepSeek-MoE v1 (`model_type: "deepseek"`): configuration, model, and their registration with
transformers.

Owns everything the architecture needs of transformers' internals. Knows nothing of offloading: to
the rest of outrider it is one more MoE whose experts answer to `set_experts_implementation`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import use_experts_implementation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

MODEL_TYPE = "deepseek"
RENORMALISATION_EPS = 1e-20  # the published v1 gate's guard against dividing by zero


@strict
class DeepseekConfig(LlamaConfig):
    """The published configuration, field for field; the defaults are those of deepseek-
    moe-16b-base.

    `num_experts` is another name of `n_routed_experts`. ValueError where the gate is not the v1
    softmax gate or asks for more experts than there are.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}
    base_model_tp_plan = (
        None  # the experts have no tensor-parallel plan: outrider runs on one device
    )

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def validate_architecture(self) -> None:
        """Called by transformers once the fields are set."""
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(
                f"the configuration asks for scoring_func={self.scoring_func!r}; a {MODEL_TYPE!r} "
                "checkpoint has 'softmax' (later DeepSeek families have a model_type of their own)"
            )
        if self.n_routed_experts is not None and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"the configuration asks for num_experts_per_tok={self.num_experts_per_tok} of "
                f"n_routed_experts={self.n_routed_experts}; the first can be at most the second"
            )

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx`, counted from 0 with the dense ones, holds routed
        experts.
        """
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )


class DeepseekMLP(nn.Module):
    """SwiGLU feed-forward block: the dense layers, and the shared experts of all others fused into
    one.
    """

    def __init__(self, config: DeepseekConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(
            self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        )


class DeepseekTopKRouter(nn.Module):
    """The v1 gate. Unlike V2 and V3 it never leaves the model's dtype, so bf16 scores tie often.

    Which of two tied experts is taken is `torch.topk`'s choice, pinned in the tests.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [T, H] (or [B, S, H]) -> router_logits [T, E], topk_weights [T, K], topk_indices
        [T, K] (int64).
        """
        router_logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        return router_logits, *self.choose(router_logits)

    def choose(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """router_logits [T, E] -> topk_weights [T, K], topk_indices [T, K] (int64)."""
        scores = router_logits.softmax(dim=-1)
        topk_weights, topk_indices = torch.topk(scores, self.top_k, dim=-1)
        if self.norm_topk_prob:
            topk_weights = topk_weights / (
                topk_weights.sum(dim=-1, keepdim=True) + RENORMALISATION_EPS
            )
        return topk_weights, topk_indices


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of one layer, fused: gate_up_proj [E, 2I, H] (gate first), down_proj [E,
    H, I].
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(
            torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim)
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The `eager` implementation: [T, H] with its routing [T, K] -> [T, H], one expert after
        the other.
        """
        combined = torch.zeros_like(hidden_states)
        for expert_idx in top_k_index.unique().tolist():
            token_idx, choice = torch.where(top_k_index == expert_idx)
            gate_up = F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx])
            gate, up = gate_up.chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, self.down_proj[expert_idx])
            combined.index_add_(0, token_idx, expert_out * top_k_weights[token_idx, choice, None])
        return combined


class DeepseekMoE(nn.Module):
    """Routed experts plus the shared ones, which always run."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekTopKRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = (
            DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, topk_weights, topk_indices = self.gate(tokens)
        output = self.experts(tokens, topk_indices, topk_weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view(hidden_states.shape)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with another feed-forward block; its forward is inherited."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = (
            DeepseekMoE(config)
            if config.is_moe_layer(layer_idx)
            else DeepseekMLP(config, config.intermediate_size)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["DeepseekDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, object]] = {
        "router_logits": OutputRecorder(DeepseekTopKRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (DeepseekExperts, DeepseekTopKRouter)):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The decoder without its head; the forward is Llama's."""

    def __init__(self, config: DeepseekConfig) -> None:
        LlamaPreTrainedModel.__init__(
            self, config
        )  # not LlamaModel's, which would build dense layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DeepseekDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The language model, under the architecture name that checkpoints carry."""

    def __init__(self, config: DeepseekConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` know the architecture. Idempotent; called on
    import.

    Checkpoints keep one tensor per expert and projection; transformers merges them while loading
    and splits them while saving, by the rule it has for qwen2_moe, whose names are the same.
    """
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    if mapping is None:
        raise RuntimeError(
            "the installed transformers has no checkpoint conversion for qwen2_moe, which deepseek "
            "checkpoints share; outrider needs transformers 5.20 or newer"
        )
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)


register()
