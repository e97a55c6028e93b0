"""Decoders of Llama's form: which families have it, and where their modules differ.

Such decoders go past transformers' own forward, on the CPU (`native_decoder`) and on a device
(`device_decoder`). Knows modules; computes nothing.
"""

from typing import Any

from ...kernels.router import ChoiceRule
from .deepseek import RENORMALISATION_EPS, DeepseekTopKRouter

# Families whose decoder layers are norm, attention, residual, norm, block, residual, with rotary
# heads; each is compared with transformers' own forward in the tests.
FAMILIES = frozenset({"deepseek", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
# Rotary frequencies that do not change with the length of the text.
_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def has_form(model: Any) -> bool:
    """Whether the model is one of `FAMILIES`, without clipped queries or a sliding window of some
    layers only."""
    config = model.config
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    return (
        config.model_type in FAMILIES
        and getattr(rotary, "rope_type", None) in _FIXED_ROTARY
        and (config.model_type == "mixtral" or not getattr(config, "sliding_window", None))
        and not getattr(config, "clip_qkv", None)
    )


def num_kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def shared_experts(module: Any) -> tuple[Any, Any]:
    """A block's shared experts and the gate before them, None where it has none.

    DeepSeek's are added as they are, Qwen's behind a gate of their own.
    """
    shared = getattr(module, "shared_experts", None)
    shared = getattr(module, "shared_expert", None) if shared is None else shared
    return shared, getattr(module, "shared_expert_gate", None)


def choice_rule(router: Any, config: Any) -> ChoiceRule:
    """How the family's router makes its choice of its logits."""
    is_deepseek = isinstance(router, DeepseekTopKRouter)
    is_mixtral = config.model_type == "mixtral"
    return ChoiceRule(
        top_k=router.top_k,
        is_renormalised=is_mixtral or router.norm_topk_prob,
        rounds_scores=is_deepseek,
        rounds_weights=not is_mixtral,
        epsilon=RENORMALISATION_EPS if is_deepseek else 0.0,
    )
