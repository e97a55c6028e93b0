"""The optimiser of outrider-nano: Muon for hidden matrices, fused experts included, AdamW for
everything else.

Owns update rules and their state, as named tensors that a safetensors file can hold. Knows nothing
of schedules: `step` is told the multiplier of every learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .worker import Crew

MUON_LR = 0.02
MUON_MOMENTUM = 0.95
ADAM_LR = 4e-3
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-10
ROUTER_LR = 1e-3
WEIGHT_DECAY = 0.01
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each in a batch [B, M, N], roughly: singular values end
    within 0.7-1.2.

    The quintic Newton-Schulz iteration and its coefficients are those of Muon (Keller Jordan et
    al., "Muon: An optimizer for hidden layers in neural networks", 2024), here batched and in
    float32.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW:
    """Both rules over one model. Gate and up halves of a fused expert parameter are orthogonalised
    apart.
    """

    def __init__(self, model: nn.Module) -> None:
        self.muon: dict[str, nn.Parameter] = {}
        self.adam: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            hidden = (
                parameter.ndim >= 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
            )
            (self.muon if hidden else self.adam)[name] = parameter
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.muon.items():
            self.state[f"momentum.{name}"] = torch.zeros_like(parameter)
        for name, parameter in self.adam.items():
            self.state[f"mean.{name}"] = torch.zeros_like(parameter)
            self.state[f"square.{name}"] = torch.zeros_like(parameter)

    def step(self, number: int, multiplier: float, *, crew: Crew | None = None) -> None:
        """Applies the gradients and clears them; `number` counts from 1, `multiplier` scales every
        rate. A crew shares the parameters out over its threads.
        """

        @torch.no_grad()
        def update(name: str) -> None:
            if name in self.muon:
                self._muon_update(name, self.muon[name], multiplier=multiplier)
            else:
                self._adam_update(name, self.adam[name], number=number, multiplier=multiplier)

        largest_first = sorted((*self.muon, *self.adam), key=self._size, reverse=True)
        if crew is not None:
            crew.each(largest_first, update)
        else:
            for name in largest_first:
                update(name)

    def _size(self, name: str) -> int:
        return (self.muon | self.adam)[name].numel()

    def _muon_update(self, name: str, parameter: nn.Parameter, *, multiplier: float) -> None:
        if parameter.grad is None:
            return
        momentum = self.state[f"momentum.{name}"]
        momentum.lerp_(parameter.grad, 1 - MUON_MOMENTUM)
        update = orthogonalise(_matrices(name, parameter.grad.lerp_(momentum, MUON_MOMENTUM)))
        rate = MUON_LR * multiplier
        scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        parameter.mul_(1 - rate * WEIGHT_DECAY)
        parameter.sub_(update.reshape(parameter.shape), alpha=rate * scale)
        parameter.grad = None

    def _adam_update(
        self, name: str, parameter: nn.Parameter, *, number: int, multiplier: float
    ) -> None:
        if parameter.grad is None:
            return
        mean, square = self.state[f"mean.{name}"], self.state[f"square.{name}"]
        beta1, beta2 = ADAM_BETAS
        mean.lerp_(parameter.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        denominator = (square / (1 - beta2**number)).sqrt_().add_(ADAM_EPS)
        rate = (ROUTER_LR if name.endswith("mlp.gate.weight") else ADAM_LR) * multiplier
        parameter.addcdiv_(mean, denominator, value=-rate / (1 - beta1**number))
        parameter.grad = None


def _matrices(name: str, tensor: Tensor) -> Tensor:
    """A hidden parameter as a batch of the matrices it is made of."""
    if name.endswith("gate_up_proj"):
        return tensor.view(tensor.shape[0] * 2, tensor.shape[1] // 2, tensor.shape[2])
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
