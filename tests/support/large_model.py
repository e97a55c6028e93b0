"""A qwen3_moe checkpoint of any size, streamed to disk in blocks: memory is not the limit."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from families import save_tokenizer

_BLOCK_BYTES = 16 << 20
_VOCAB = 320


@dataclass(frozen=True)
class LargeModel:
    """Sizes of what was written, in bytes of its files."""

    folder: Path
    num_experts: int
    dense_bytes: int
    expert_bytes: int


def write(
    folder: Path,
    *,
    num_layers: int,
    num_experts: int,
    hidden_size: int,
    expert_size: int,
    top_k: int = 8,
    num_dense_rows: int = _VOCAB,
    seed: int = 0,
) -> LargeModel:
    """bf16, one shard a layer. Weights are random of one magnitude: logits stay finite.

    `num_dense_rows` is the vocabulary, by which the dense part grows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads, head_dim = hidden_size // 64, 64
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": num_dense_rows,
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": num_layers,
        "intermediate_size": 4 * hidden_size,
        "moe_intermediate_size": expert_size,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "bos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    weight_map: dict[str, str] = {}
    dense = {
        "model.embed_tokens.weight": (num_dense_rows, hidden_size),
        "model.norm.weight": (hidden_size,),
        "lm_head.weight": (num_dense_rows, hidden_size),
    }
    dense_bytes = _write_shard(folder, "dense.safetensors", dense, weight_map, seed=seed)
    expert_bytes = 0
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        rest = {
            f"{name}.input_layernorm.weight": (hidden_size,),
            f"{name}.post_attention_layernorm.weight": (hidden_size,),
            f"{name}.self_attn.q_norm.weight": (head_dim,),
            f"{name}.self_attn.k_norm.weight": (head_dim,),
            f"{name}.mlp.gate.weight": (num_experts, hidden_size),
        }
        for projection in "qkvo":
            rest[f"{name}.self_attn.{projection}_proj.weight"] = (hidden_size, hidden_size)
        dense_bytes += _write_shard(
            folder, f"dense-{layer}.safetensors", rest, weight_map, seed=seed + layer
        )
        experts = {
            f"{name}.mlp.experts.{expert}.{projection}_proj.weight": shape
            for expert in range(num_experts)
            for projection, shape in (
                ("gate", (expert_size, hidden_size)),
                ("up", (expert_size, hidden_size)),
                ("down", (hidden_size, expert_size)),
            )
        }
        expert_bytes += _write_shard(
            folder, f"experts-{layer}.safetensors", experts, weight_map, seed=seed + layer
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return LargeModel(folder, num_layers * num_experts, dense_bytes, expert_bytes)


def _write_shard(
    folder: Path,
    file_name: str,
    shapes: dict[str, tuple[int, ...]],
    weight_map: dict[str, str],
    *,
    seed: int,
) -> int:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        weight_map[name] = file_name
    text = json.dumps(header).encode()
    # Random sign and mantissa; the exponent makes every weight 1/32 to 1/16 in magnitude.
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 16, _BLOCK_BYTES // 2, dtype=np.uint16)
    block = memoryview((bits & 0x807F) | np.uint16((127 - 5) << 7)).cast("B")
    with (folder / file_name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for offset in range(0, end, _BLOCK_BYTES):
            file.write(block[: min(_BLOCK_BYTES, end - offset)])
    return end
