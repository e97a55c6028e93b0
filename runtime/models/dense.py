"""Dense layers in int8 or int4: which linear layers of a model may be, and what stands for them.

Knows modules, no checkpoint; the formats are `kernels.quantization`'s.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...kernels.linear import MAX_NATIVE_TOKENS, linear, prepared
from ...kernels.product import Product
from ...kernels.quantization import PLAIN_DTYPES, quantize
from ..errors import InvalidDataError, UnsupportedModelError
from .adapter import MoeLayer

_HALF = (torch.bfloat16, torch.float16)
FORMATS = {dtype: fmt for fmt, dtype in PLAIN_DTYPES.items()}
_PREFIX = "quantized_"  # of the buffers, so that none is called `weight`


class QuantizedLinear(nn.Module):
    """Stands for an `nn.Linear` whose weight is kept as parts of `fmt`; computes after `hold`.

    [..., K] -> [..., N] in the input's dtype.
    """

    def __init__(self, replaced: nn.Linear, *, fmt: str) -> None:
        super().__init__()
        self.fmt = fmt
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.bias = replaced.bias
        self._part_names: tuple[str, ...] = ()
        self._product: Product | None = None

    @property
    def weight(self) -> Tensor:
        """Always refused: a family that reads it would compute with something else than `forward`.

        Not a tensor without values either, which torch multiplies into garbage without a word.
        """
        raise UnsupportedModelError(
            "this family reads the weight of a linear layer itself, so its dense weights cannot be "
            f"kept in {self.fmt}; use --dense-format same"
        )

    @property
    def parts(self) -> dict[str, Tensor]:
        """The weight as `kernels.quantization.quantize` gives it; empty before `hold`."""
        return {name: getattr(self, _PREFIX + name) for name in self._part_names}

    def hold(self, weight: Tensor) -> None:
        """Quantise `weight` [N, K] and keep the result, on its device.

        Raises InvalidDataError for another shape, or for a weight that is not finite.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise InvalidDataError(
                f"weight has shape {list(weight.shape)}, the configuration wants "
                f"{[self.out_features, self.in_features]}; config.json and weights do not belong "
                "together"
            )
        if weight.dtype not in PLAIN_DTYPES.values():
            weight = weight.float()
        parts = quantize(weight, self.fmt)
        if not parts["scale"].isfinite().all():
            raise InvalidDataError(f"weight holds NaN or infinity, which {self.fmt} does not")
        for name, part in parts.items():
            self.register_buffer(_PREFIX + name, part)
        self._part_names = tuple(parts)
        self._product = None

    def share(self, parts: Mapping[str, Tensor]) -> None:
        """Compute from `parts` instead, which hold the same values."""
        for name, part in parts.items():
            self.register_buffer(_PREFIX + name, part)
        self._product = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self._product is not None:
            out = _by_product(self._product, hidden_states, self.in_features)
            if out is not None:
                return out
        parts = self.parts
        if hidden_states.is_cuda:
            return linear(hidden_states, parts, fmt=self.fmt, bias=self.bias, impl="triton")
        self._product = prepared(parts, fmt=self.fmt, columns=self.in_features, bias=self.bias)
        return linear(hidden_states, parts, fmt=self.fmt, bias=self.bias)

    def extra_repr(self) -> str:
        """What stands between the brackets when a model is printed."""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {self.fmt}, bias={has_bias}"


def _by_product(product: Product, hidden_states: Tensor, columns: int) -> Tensor | None:
    """[..., K] -> [..., N] where these rows are what `product` is for, else None."""
    num_rows = hidden_states.numel() // columns
    if num_rows > MAX_NATIVE_TOKENS or not hidden_states.is_cpu:
        return None
    if not hidden_states.is_contiguous():
        hidden_states = hidden_states.contiguous()
    return product(hidden_states, num_rows)


class HalfLinear(nn.Linear):
    """An `nn.Linear` in bf16 or fp16 that computes through our kernels on the CPU.

    PyTorch's own products in these dtypes are several times slower than fp32 ones on processors
    that have no units for them.
    """

    _product: Product | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype, sums in fp32."""
        weight = self.weight
        if self._product is not None and self._product.address == weight.data_ptr():
            out = _by_product(self._product, input, self.in_features)
            if out is not None:
                return out
        fmt = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
        parts = {"weight": weight}
        self._product = prepared(parts, fmt=fmt, columns=self.in_features, bias=self.bias)
        return linear(input, parts, fmt=fmt, bias=self.bias)


def replace_half_linears(model: nn.Module) -> None:
    """Put a `HalfLinear` in the place of each plain `nn.Linear` of a model on the meta device."""
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype in _HALF:
                stand_in = HalfLinear(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    device="meta",
                    dtype=child.weight.dtype,
                )
                setattr(parent, leaf, stand_in)


def quantize_linears(
    model: nn.Module, layers: Collection[MoeLayer], *, fmt: str, kept: Collection[str]
) -> dict[str, QuantizedLinear]:
    """Put a `QuantizedLinear` in the place of each linear layer of attention, shared experts, dense
    blocks and the output head; returns them by the name of their weight, to be filled by `hold`.

    Left alone are the layers that decide routing and those whose weight's name is in `kept`.
    """
    routing = _routing_modules(model, layers)
    chosen = {
        name: module
        for name, module in model.named_modules()
        # A subclass may compute something else than the product.
        if type(module) is nn.Linear and module not in routing and f"{name}.weight" not in kept
    }
    replaced: dict[str, QuantizedLinear] = {}
    for name, module in chosen.items():
        parent, _, leaf = name.rpartition(".")
        stand_in = replaced[f"{name}.weight"] = QuantizedLinear(module, fmt=fmt)
        setattr(model.get_submodule(parent), leaf, stand_in)
    return replaced


def weight_parts(module: nn.Module) -> tuple[dict[str, Tensor], str] | None:
    """A linear layer's weight as parts of a format, and the format; None for any other module."""
    if isinstance(module, QuantizedLinear):
        return module.parts, module.fmt
    if not isinstance(module, nn.Linear) or module.weight.dtype not in FORMATS:
        return None
    return {"weight": module.weight.detach()}, FORMATS[module.weight.dtype]


def stack_weights(modules: Sequence[nn.Module]) -> tuple[dict[str, Tensor], str] | None:
    """The weights of linear layers one below the other, as parts of their format.

    The modules then use their share of it, so that nothing is held twice. None, and nothing done,
    where one is no linear layer or formats differ.
    """
    found = [weight_parts(module) for module in modules]
    if None in found:
        return None
    kept = [one for one in found if one is not None]
    fmt = kept[0][1]
    if any(other != fmt for _, other in kept):
        return None
    if len(kept) == 1:
        return kept[0]
    stacked = {
        name: _one_below_the_other([parts[name] for parts, _ in kept]) for name in kept[0][0]
    }
    begin = 0
    for module, (parts, _) in zip(modules, kept, strict=True):
        end = begin + parts["weight"].shape[0]
        shares = {name: whole[begin:end] for name, whole in stacked.items()}
        if isinstance(module, QuantizedLinear):
            module.share(shares)
        else:
            module.weight = nn.Parameter(shares["weight"], requires_grad=False)
        begin = end
    return stacked, fmt


def _one_below_the_other(matrices: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; no copy where they lie so already."""
    first = matrices[0]
    end = first.storage_offset()
    for one in matrices:
        is_next = one.storage_offset() == end and one.is_contiguous()
        if not is_next or one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(matrices))
        end += one.numel()
    shape = (sum(one.shape[0] for one in matrices), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _routing_modules(model: nn.Module, layers: Collection[MoeLayer]) -> set[nn.Module]:
    """Everything beside the experts that turns a token into weights of experts.

    A linear layer standing directly in a Mixture-of-Experts block is a gate, of all experts or of
    the shared one; a block with a matrix of one row an expert is a router.
    """
    found: set[nn.Module] = set()
    for layer in layers:
        block = model.get_submodule(layer.name.rpartition(".")[0])
        for child in block.children():
            if child is layer.experts:
                continue
            rows = {p.shape[0] for p in child.parameters() if p.dim() == 2}
            if isinstance(child, nn.Linear) or child is layer.router or layer.num_experts in rows:
                found.update(child.modules())
    return found
