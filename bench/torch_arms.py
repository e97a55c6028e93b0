"""PyTorch's own products on the CPU, with the weights that the kernels get: what is compared with.

`linear` for plain formats, `_weight_int8pack_mm` for int8, `_weight_int4pack_mm_for_cpu` for int4;
nf4 has none. Knows no clock.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.quantization import GROUP_SIZE, PLAIN_DTYPES
from .expert_case import ExpertCase

_Product = Callable[[Tensor], Tensor]


class TorchLinear:
    """Matrices of one shape as PyTorch's ops take them."""

    def __init__(self, products: Sequence[_Product]) -> None:
        self._products = products

    @classmethod
    def of(
        cls,
        matrices: Sequence[Mapping[str, Tensor]],
        shape: tuple[int, int],
        fmt: str,
        dtype: torch.dtype,
    ) -> "TorchLinear | None":
        """None where PyTorch has no op for `fmt` with activations of `dtype` on these tensors."""
        if fmt in PLAIN_DTYPES and PLAIN_DTYPES[fmt] == dtype:
            return cls([_plain(parts["weight"]) for parts in matrices])
        if dtype != torch.bfloat16 or not matrices[0]["weight"].is_cpu:
            return None
        if fmt == "int8":
            return cls([_int8(parts["weight"], parts["scale"]) for parts in matrices])
        if fmt == "int4":
            # Copies of one packed matrix: packing takes long, and each copy is as cold.
            return cls(_int4_copies(matrices[0], shape, len(matrices)))
        return None

    def runner(self, rows: Tensor) -> Callable[[int], Tensor]:
        """rows by the matrix of each turn."""
        return lambda turn: self._products[turn % len(self._products)](rows)


class TorchExperts:
    """Experts as PyTorch's ops take them, one product after the other: the eager way."""

    def __init__(self, experts: ExpertCase, products: Sequence[Sequence[_Product]]) -> None:
        self._experts = experts
        self._gate_up, self._down = products
        self._is_copied = experts.fmt == "int4"

    @classmethod
    def of(cls, experts: ExpertCase, dtype: torch.dtype) -> "TorchExperts | None":
        """None where PyTorch has no op for the format."""
        products = []
        for name, shape in experts.shapes.items():
            matrices = [experts.parts(name, slot) for slot in range(experts.num_slots)]
            found = TorchLinear.of(matrices, shape, experts.fmt, dtype)
            if found is None:
                return None
            products.append(found._products)
        return cls(experts, products)

    def runner(
        self, rows: Tensor, turns: Sequence[Tensor], weights: Tensor
    ) -> tuple[Callable[[int], Tensor], Callable[[], Tensor]]:
        """One token [1, H] through the experts of each turn, and what turn 0 should give."""
        chosen = [ids.tolist() for ids in turns]
        scales = weights[0].tolist()

        def run(turn: int) -> Tensor:
            out = torch.zeros_like(rows)
            for slot, scale in zip(chosen[turn % len(chosen)], scales, strict=True):
                gate, up = self._gate_up[slot](rows).chunk(2, dim=-1)
                out += scale * self._down[slot](functional.silu(gate) * up)
            return out

        def truth() -> Tensor:
            slots = [0] * len(scales) if self._is_copied else chosen[0]
            products = [
                scale * self._experts.expert_rows(rows, slot)
                for slot, scale in zip(slots, scales, strict=True)
            ]
            return torch.stack(products).sum(0)

        return run, truth


def _plain(weight: Tensor) -> _Product:
    return lambda rows: functional.linear(rows, weight)


def _int8(weight: Tensor, scale: Tensor) -> _Product:
    narrow = scale.bfloat16()
    return lambda rows: torch._weight_int8pack_mm(rows, weight, narrow)


def _int4_copies(parts: Mapping[str, Tensor], shape: tuple[int, int], count: int) -> list[_Product]:
    n, k = shape
    packed = parts["weight"].view(n, k // GROUP_SIZE, GROUP_SIZE // 2)
    steps = torch.cat((packed & 0xF, packed >> 4), dim=-1).view(n, k).int()
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    weight = pack(steps, 1)
    scale = parts["scale"].T.contiguous()  # [K / 64, N]
    scales = torch.stack((scale, torch.zeros_like(scale)), dim=-1)

    def product(weight: Tensor, scales: Tensor) -> _Product:
        return lambda rows: multiply(rows, weight, GROUP_SIZE, scales)

    return [product(weight.clone(), scales.clone()) for _ in range(count)]
