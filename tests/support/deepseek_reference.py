"""DeepSeek-MoE v1 on one page of PyTorch, from its paper and the published tensor names: the truth
of the tests.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """input_ids [S] -> logits [S, V] of one sequence, in the checkpoint's dtype."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + attention(
            config, weights, name, norm(config, weights, f"{name}.input_layernorm", x)
        )
        h = norm(config, weights, f"{name}.post_attention_layernorm", x)
        sparse = layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0
        x = x + (
            moe(config, weights, f"{name}.mlp", h) if sparse else mlp(weights, f"{name}.mlp", h)
        )
    return norm(config, weights, "model.norm", x) @ weights["lm_head.weight"].T


def norm(config, weights, name, x):
    scale = torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"])
    return x / scale * weights[f"{name}.weight"]


def attention(config, weights, name, x):
    positions, heads = x.shape[0], config["num_attention_heads"]
    q, k, v = (
        (x @ weights[f"{name}.self_attn.{part}_proj.weight"].T)
        .view(positions, heads, -1)
        .transpose(0, 1)
        for part in "qkv"
    )
    q, k = rotate(config, q), rotate(config, k)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    return (
        mixed.transpose(0, 1).reshape(positions, -1) @ weights[f"{name}.self_attn.o_proj.weight"].T
    )


def rotate(config, x):
    """Rotary embedding of [heads, positions, d]: pairs (i, i + d/2), angle position *
    theta^(-2i/d).
    """
    half = x.shape[-1] // 2
    # Published configurations have the first form, those that transformers 5 saves the second.
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1])[:, None] * frequency)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def mlp(weights, name, x):
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    inner = x @ gate.T
    return (inner * torch.sigmoid(inner) * (x @ up.T)) @ down.T


def moe(config, weights, name, x):
    scores = (x @ weights[f"{name}.gate.weight"].T).softmax(-1)
    out = (
        mlp(weights, f"{name}.shared_experts", x)
        if config["n_shared_experts"]
        else torch.zeros_like(x)
    )
    for token in range(len(x)):
        chosen = scores[token].sort(descending=True).indices[: config["num_experts_per_tok"]]
        total = scores[token, chosen].sum() + 1e-20 if config["norm_topk_prob"] else 1.0
        for expert in chosen.tolist():
            weight = scores[token, expert] / total
            out[token] += weight * mlp(weights, f"{name}.experts.{expert}", x[token])
    return out
