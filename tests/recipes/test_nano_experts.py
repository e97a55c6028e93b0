"""The training experts against autograd through the eager ones."""

import pytest
import torch

from outrider.runtime.models.deepseek import DeepseekConfig, DeepseekExperts
from recipes.nano import experts

NUM_EXPERTS = 6


def inputs(routing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    if routing == "one-expert-unused":
        indices = torch.stack([torch.randperm(NUM_EXPERTS - 1)[:3] for _ in range(13)])
    elif routing == "all-to-the-same":
        indices = torch.tensor([[5, 0, 2]]).expand(13, 3)
    else:
        indices = torch.stack([torch.randperm(NUM_EXPERTS)[:3] for _ in range(13)])
    weights = torch.rand(13, 3, dtype=torch.float64, requires_grad=True)
    return hidden, indices, weights


@pytest.mark.parametrize("routing", ["spread", "one-expert-unused", "all-to-the-same"])
def test_values_and_all_gradients_equal_the_eager_experts(routing: str) -> None:
    config = DeepseekConfig(
        hidden_size=8, num_attention_heads=1, moe_intermediate_size=5, n_routed_experts=NUM_EXPERTS
    )
    config.num_experts_per_tok = 3
    module = DeepseekExperts(config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    results = []
    for implementation in ("eager", experts.register()):
        module.config._experts_implementation = implementation
        hidden, indices, weights = inputs(routing)
        output = module(hidden, indices, weights)
        target = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        leaves = (hidden, weights, module.gate_up_proj, module.down_proj)
        results.append((output, *torch.autograd.grad((output * target).sum(), leaves)))
    for eager, sorted_way in zip(*results, strict=True):
        torch.testing.assert_close(sorted_way, eager, rtol=1e-10, atol=1e-12)
