"""The chunked cross-entropy against PyTorch's, and the meaning of the balance."""

import torch
import torch.nn.functional as F

from recipes.nano import loss


def test_cross_entropy_and_gradients_equal_torch() -> None:
    torch.manual_seed(0)
    rows = loss.CHUNK_ROWS + 37
    hidden = (40 * torch.randn(rows, 6, dtype=torch.float64)).requires_grad_()
    head = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (rows,))
    ours = loss.head_cross_entropy(hidden, head, targets)
    truth = F.cross_entropy(hidden @ head.T, targets)
    torch.testing.assert_close(ours, truth)
    for mine, true in zip(
        torch.autograd.grad(3 * ours, (hidden, head)),
        torch.autograd.grad(3 * truth, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(mine, true)


def test_balance_is_one_when_even_and_the_number_of_experts_when_one_takes_all() -> None:
    even = loss.expert_balance(torch.zeros(10, 4), torch.full((4,), 5.0))
    alone = loss.expert_balance(
        torch.tensor([[50.0, 0, 0, 0]]).expand(10, 4), torch.tensor([20.0, 0, 0, 0])
    )
    torch.testing.assert_close(even, torch.tensor(1.0))
    torch.testing.assert_close(alone, torch.tensor(4.0))
