"""The expert op against a reference of its own, in every format, and what may not change it."""

from itertools import product

import pytest
import torch
from torch.nn import functional

from outrider.kernels import native
from outrider.kernels.expert_mlp import combine, expert_mlp, expert_outputs
from outrider.kernels.quantization import FORMATS, dequantize, quantize
from outrider.kernels.weights import part_name

# Relative RMS error against float64, by activation dtype; the experts' inner values are fp32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
NUM_SLOTS = 6
# hidden, intermediate, tokens, top_k: each names its edge.
CASES = {
    "one-token": (128, 64, 1, 3),
    "one-expert": (128, 64, 5, 1),
    "every-expert": (64, 64, 2, NUM_SLOTS),
    "many-tokens": (128, 192, 70, 2),
    "odd-sizes": (96, 80, 7, 3),
    "odd-groups": (192, 320, 3, 2),
}
IMPLS = ["reference", "cpu", *native.ISAS]


@pytest.fixture
def impl(request):
    """An implementation; the native one under each instruction set that this processor has."""
    if request.param not in native.ISAS:
        yield request.param
        return
    own = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"no {request.param} kernels here")
    yield "cpu"
    native.use_isa(own)


def _experts(hidden: int, inner: int, fmt: str, *, seed: int = 0):
    """An arena of NUM_SLOTS used slots between poisoned ones, and the weights in float64."""
    generator = torch.Generator().manual_seed(seed)
    arena: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        weight = torch.randn(NUM_SLOTS, *shape, generator=generator) * shape[1] ** -0.5
        parts = quantize(weight, fmt)
        plain[name] = torch.stack(
            [
                dequantize(
                    {part: value[slot] for part, value in parts.items()},
                    fmt,
                    dtype=torch.float64,
                    shape=shape,
                )
                for slot in range(NUM_SLOTS)
            ]
        )
        for part, value in parts.items():
            # Every other slot is 0xFF bytes: NaN in each float format.
            spaced = torch.empty(2 * NUM_SLOTS, *value.shape[1:], dtype=value.dtype)
            spaced.view(torch.uint8).fill_(0xFF)
            spaced[::2] = value
            arena[part_name(name, part)] = spaced
    return arena, plain


def _truth(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, plain) -> torch.Tensor:
    total = torch.zeros(rows.shape, dtype=torch.float64)
    for token in range(ids.shape[0]):
        for choice in range(ids.shape[1]):
            expert = int(ids[token, choice])
            gate, up = (plain["gate_up_proj"][expert] @ rows[token].double()).chunk(2)
            out = plain["down_proj"][expert] @ (functional.silu(gate) * up)
            total[token] += float(weights[token, choice]) * out
    return total


def _routing(num_tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack(
        [torch.randperm(NUM_SLOTS, generator=generator)[:top_k] for _ in range(num_tokens)]
    )
    return ids, torch.rand(num_tokens, top_k, generator=generator)


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *product(["reference", "cpu"], TOLERANCE),
        *product(native.ISAS, [torch.float32]),
    ],
    indirect=["impl"],
    ids=str,
)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_expert_mlp_equals_float64_on_dequantised_weights(case, fmt, dtype, impl) -> None:
    hidden, inner, num_tokens, top_k = case
    arena, plain = _experts(hidden, inner, fmt)
    ids, weights = _routing(num_tokens, top_k)
    rows = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
    result = expert_mlp(rows, 2 * ids, weights, arena, fmt=fmt, order=ids, impl=impl)
    assert result.dtype == dtype
    assert _error(result, _truth(rows, ids, weights, plain)) < 2 * TOLERANCE[dtype]


def test_tolerance_notices_one_expert_in_the_place_of_another() -> None:
    arena, plain = _experts(128, 64, "bf16")
    ids, weights = _routing(4, 2)
    rows = torch.randn(4, 128).bfloat16()
    swapped = torch.where(ids == 0, 1, torch.where(ids == 1, 0, ids))
    result = expert_mlp(rows, 2 * swapped, weights, arena, fmt="bf16", order=ids, impl="cpu")
    assert _error(result, _truth(rows, ids, weights, plain)) > 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("impl", IMPLS[1:], indirect=True)
def test_bits_do_not_depend_on_company_order_or_threads(
    impl: str, fmt: str, num_tokens: int
) -> None:
    arena, _ = _experts(128, 64, fmt)
    rows = torch.randn(num_tokens, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    tokens = torch.arange(num_tokens)

    def outputs(slots: list[int]) -> dict[int, torch.Tensor]:
        token_idx = tokens.repeat(len(slots))
        slot_ids = torch.tensor(slots).repeat_interleave(num_tokens)
        out = torch.full((len(slot_ids), 128), float("nan"), dtype=torch.bfloat16)
        expert_outputs(rows, (token_idx, slot_ids), arena, fmt=fmt, out=out, impl=impl)
        assert out.isfinite().all()
        return dict(zip(slots, out.view(len(slots), num_tokens, 128), strict=True))

    together = outputs([0, 2, 4, 6])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outputs([4]) | outputs([6]) | outputs([2, 0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(together[slot], alone[slot]) for slot in together)


def test_combine_bits_do_not_depend_on_the_order_of_the_router() -> None:
    outputs = torch.randn(9, 4, 64).bfloat16()
    ids, weights = _routing(9, 4)
    shuffle = torch.randperm(4)
    first = combine(outputs, weights, ids)
    second = combine(outputs[:, shuffle], weights[:, shuffle], ids[:, shuffle])
    assert torch.equal(first, second)
