"""DeepSeek-MoE v1 against an independent reference, and the pinned habits of its gate."""

import json
from pathlib import Path

import deepseek_reference as reference
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from outrider.runtime.models import deepseek
from outrider.runtime.models.deepseek import (
    DeepseekConfig,
    DeepseekExperts,
    DeepseekForCausalLM,
    DeepseekTopKRouter,
)

PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "model_type": "deepseek",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """A random checkpoint in the published layout, written without the code under test."""
    config = PUBLISHED | changes
    random = torch.Generator().manual_seed(3)
    hidden, wide, narrow = (
        config[f"{n}_size"] for n in ("hidden", "intermediate", "moe_intermediate")
    )

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) / shape[-1] ** 0.5

    def mlp(name: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.gate_proj.weight": matrix(size, hidden),
            f"{name}.up_proj.weight": matrix(size, hidden),
            f"{name}.down_proj.weight": matrix(hidden, size),
        }

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "lm_head.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": 1 + matrix(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.{part}_proj.weight": matrix(hidden, hidden) for part in "qkvo"
        }
        weights[f"{name}.input_layernorm.weight"] = 1 + matrix(hidden)
        weights[f"{name}.post_attention_layernorm.weight"] = 1 + matrix(hidden)
        if layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"]:
            weights |= mlp(f"{name}.mlp", wide)
            continue
        weights[f"{name}.mlp.gate.weight"] = 3 * matrix(config["n_routed_experts"], hidden)
        weights |= mlp(f"{name}.mlp.shared_experts", narrow * config["n_shared_experts"])
        for expert in range(config["n_routed_experts"]):
            weights |= mlp(f"{name}.mlp.experts.{expert}", narrow)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DeepseekForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as-published"),
        pytest.param({"norm_topk_prob": True}, id="renormalised"),
        pytest.param({"moe_layer_freq": 2}, id="every-second-layer"),
        pytest.param({"first_k_dense_replace": 3}, id="three-dense-layers"),
        pytest.param({"num_experts_per_tok": 8}, id="all-experts"),
    ],
)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_logits_equal_the_reference(tmp_path: Path, changes: dict, experts: str) -> None:
    folder = write_checkpoint(tmp_path, **changes)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.set_experts_implementation(experts)
    ids = prompt(21)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids).logits[0], reference.logits(folder, ids[0]), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decoding_equals_the_full_pass(model: DeepseekForCausalLM, attention: str) -> None:
    model.set_attn_implementation(attention)
    ids = prompt(17)
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for part in ids.split([6, *[1] * 11], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_left_padding_under_a_mask_changes_nothing(model: DeepseekForCausalLM) -> None:
    ids = prompt(9)
    padded = torch.cat([torch.full((1, 4), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids).logits
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


def test_saving_writes_the_published_names_and_bytes(
    checkpoint: Path, model, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    before, after = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(prompt(12)).logits, model(prompt(12)).logits)


def test_gradients_reach_every_parameter(checkpoint: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = prompt(48, seed=1)
    trained(ids, labels=ids).loss.backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_router_logits_are_recorded_before_the_softmax(model: DeepseekForCausalLM) -> None:
    with torch.no_grad():
        recorded = model.model(prompt(5), output_router_logits=True).router_logits
    assert [tuple(each.shape) for each in recorded] == [(5, 8)] * 4
    assert not torch.allclose(recorded[0].sum(-1), torch.ones(5))


def router(dtype: torch.dtype, **changes: object) -> DeepseekTopKRouter:
    """A router of 4 experts whose logits are the hidden state itself."""
    sizes = {
        "hidden_size": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "n_routed_experts": 4,
    }
    gate = DeepseekTopKRouter(DeepseekConfig(**sizes, num_experts_per_tok=2, **changes)).to(dtype)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(4))
    return gate


def test_gate_golden_values() -> None:
    # softmax of ln(1, 2, 3, 4) is 0.1, 0.2, 0.3, 0.4; the chosen two are not renormalised.
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    logits, weights, indices = router(torch.float32)(hidden)
    torch.testing.assert_close(logits, hidden)
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]))
    assert indices.tolist() == [[3, 2]]
    _, weights, _ = router(torch.float32, norm_topk_prob=True)(hidden)
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))


def test_gate_in_bfloat16_ties_where_float32_does_not() -> None:
    # Logits one bf16 step apart at 4.0 (4.0, 4.03125): their softmax scores, about 0.25, round to
    # steps of 2^-9 or 2^-10, so two distinct logits of 4.0 and 4.0 + 2^-9 (which bf16 cannot hold)
    # give one score.
    hidden = torch.tensor([[4.0, 4.0 + 2**-9, 0.0, 4.0 + 2**-10]])
    _, _, exact = router(torch.float32)(hidden)
    assert exact.tolist() == [[1, 3]]
    logits, weights, indices = router(torch.bfloat16)(hidden.bfloat16())
    assert logits.dtype == weights.dtype == torch.bfloat16
    assert weights[0, 0] == weights[0, 1]
    assert len(set(indices[0].tolist()) & {0, 1, 3}) == 2


def test_gate_softmax_is_taken_in_the_models_dtype() -> None:
    # Two bf16 logits that differ, with scores that do not once rounded to bf16: 1/(1+e^-0.00195)
    # etc.
    hidden = torch.tensor([[0.25, 0.251953125, -30.0, -30.0]]).bfloat16()
    assert hidden[0, 0] != hidden[0, 1]
    _, weights, indices = router(torch.bfloat16)(hidden)
    upcast = hidden.float().softmax(-1)
    assert upcast[0, 1] > upcast[0, 0]
    assert weights.tolist() == [[0.5, 0.5]]
    assert indices.tolist() == [
        torch.tensor([[0.5, 0.5, 0.0, 0.0]]).bfloat16().topk(2).indices[0].tolist()
    ]


def test_registration_is_idempotent_and_needs_no_remote_code(checkpoint: Path) -> None:
    deepseek.register()
    deepseek.register()
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is DeepseekConfig
    assert config.num_experts == config.n_routed_experts == 8
    assert config.rope_parameters["rope_theta"] == 10000


def test_defaults_are_the_published_16b_model() -> None:
    config = DeepseekConfig()
    with torch.device("meta"):
        built = DeepseekForCausalLM(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == 16_375_728_128
    experts = [module for module in built.modules() if isinstance(module, DeepseekExperts)]
    assert len(experts) == 27
    assert experts[0].gate_up_proj.shape == (64, 2816, 2048)
    assert experts[0].down_proj.shape == (64, 2048, 1408)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"num_experts_per_tok": 65}, "at most"),
    ],
)
def test_configurations_of_other_gates_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        DeepseekConfig(**changes)
