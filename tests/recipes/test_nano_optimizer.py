"""Muon's orthogonalisation is what it says, and each parameter gets the rule meant for it."""

import pytest
import torch

from outrider.runtime.models.deepseek import DeepseekConfig, DeepseekForCausalLM
from recipes.nano import optimizer


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 8, 24), (5, 24, 8), (2, 1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_one_and_directions_stay(
    shape: tuple[int, ...], scale: float
) -> None:
    torch.manual_seed(0)
    matrices = scale * torch.randn(shape)
    result = optimizer.orthogonalise(matrices)
    assert result.shape == shape
    # A square random matrix has singular values near zero, which five steps cannot lift all the
    # way.
    lowest = 0.6 if shape[-1] != shape[-2] else 0.0
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3 and values.min() > lowest
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ result @ right.mT
    off_diagonal = turned - torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3


def test_a_batch_is_orthogonalised_matrix_by_matrix() -> None:
    torch.manual_seed(1)
    matrices = torch.randn(4, 6, 10)
    together = optimizer.orthogonalise(matrices)
    apart = torch.cat([optimizer.orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(together, apart)


@pytest.fixture
def model() -> DeepseekForCausalLM:
    torch.manual_seed(0)
    return DeepseekForCausalLM(
        DeepseekConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
        )
    )


def test_hidden_matrices_go_to_muon_and_the_rest_to_adam(model: DeepseekForCausalLM) -> None:
    rules = optimizer.MuonAdamW(model)
    assert {name.rsplit(".", 2)[-2] for name in rules.adam if ".layers." in name} == {
        "gate",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(rules.adam)
    assert any(name.endswith("experts.gate_up_proj") for name in rules.muon)
    assert set(rules.muon) | set(rules.adam) == {name for name, _ in model.named_parameters()}


def test_gate_and_up_halves_are_updated_apart(model: DeepseekForCausalLM) -> None:
    rules = optimizer.MuonAdamW(model)
    name = next(name for name in rules.muon if name.endswith("gate_up_proj"))
    parameter = rules.muon[name]
    before = parameter.detach().clone()
    parameter.grad = torch.randn_like(parameter)
    parameter.grad[0, 4:] *= (
        1e-3  # a tiny gradient of the up half must not be drowned by the gate's
    )
    rules.step(1, 1.0)
    change = before * (1 - optimizer.MUON_LR * optimizer.WEIGHT_DECAY) - parameter.detach()
    gate, up = (torch.linalg.svdvals(half / optimizer.MUON_LR) for half in change[0].split(4))
    assert gate.min() > 0.6 and up.min() > 0.6
    assert parameter.grad is None


def test_a_rate_of_zero_changes_nothing(model: DeepseekForCausalLM) -> None:
    rules = optimizer.MuonAdamW(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rules.step(1, 0.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
