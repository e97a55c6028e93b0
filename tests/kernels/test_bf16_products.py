"""Many rows in bf16: a processor's bf16 unit where it has one, floats elsewhere; the same promises.

The plain model beside them rounds where the unit makes it necessary, an expert's inner values, and
nowhere else.
"""

import pytest
import torch
from torch.nn import functional

from outrider.kernels import native
from outrider.kernels.expert_mlp import expert_outputs
from outrider.kernels.linear import linear
from outrider.kernels.quantization import dequantize, quantize
from outrider.kernels.weights import part_name

FORMATS = ("bf16", "int8", "int4")
UNIT = "avx512_bf16"
# hidden, intermediate: each names its edge.
SHAPES = {
    "even": (256, 128),
    "odd": (97, 43),
    "beyond-a-slice": (2144, 72),
    "inner-beyond-a-slice": (64, 2120),
}
# Rows of an expert: a tile of one row in last place, one and two tiles, beyond what meets together.
COUNTS = (5, 6, 13, 131)


@pytest.fixture(params=native.ISAS)
def isa(request):
    own = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"no {request.param} kernels here")
    yield request.param
    native.use_isa(own)


@pytest.fixture
def unit():
    own = native.isa()
    if not native.use_isa(UNIT):
        pytest.skip("this processor has no bf16 unit")
    yield
    native.use_isa(own)


def _expert(shape, fmt):
    """One expert in an arena, and its weights in float64."""
    hidden, inner = shape
    generator = torch.Generator().manual_seed(0)
    arena, plain = {}, []
    for name, (n, k) in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        parts = quantize(torch.randn(n, k, generator=generator) * k**-0.5, fmt)
        plain.append(dequantize(parts, fmt, dtype=torch.float64, shape=(n, k)))
        arena |= {part_name(name, part): value.unsqueeze(0) for part, value in parts.items()}
    return arena, plain


def _rows(count, hidden, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden, generator=generator).bfloat16()


def _outputs(rows, arena, fmt):
    count = len(rows)
    assignments = (torch.arange(count), torch.zeros(count, dtype=torch.int64))
    return expert_outputs(rows, assignments, arena, fmt=fmt, impl="cpu")


def _truth(rows, plain, *, rounded):
    gate, up = (rows.double() @ plain[0].T).chunk(2, dim=-1)
    inner = functional.silu(gate) * up
    return (inner.bfloat16().double() if rounded else inner) @ plain[1].T


def _error(result, truth):
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_experts_equal_float64_with_inner_values_rounded_where_the_unit_is(isa, shape, fmt):
    arena, plain = _expert(shape, fmt)
    rows = _rows(max(COUNTS), shape[0])
    model = _truth(rows, plain, rounded=isa == UNIT).bfloat16()
    for count in COUNTS:
        result = _outputs(rows[:count], arena, fmt)
        # Where fp32 sums fall to the other side, inner values and outputs are a bit apart.
        assert _error(result, model[:count].double()) < 1.2e-3
        assert _error(result, _truth(rows[:count], plain, rounded=False)) < 4e-3


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_model_tells_rounded_inner_values_from_exact_ones(unit, fmt):
    arena, plain = _expert((256, 128), fmt)
    rows = _rows(64, 256)
    result = _outputs(rows, arena, fmt)
    rounded, exact = (_truth(rows, plain, rounded=one).bfloat16().double() for one in (True, False))
    assert _error(result, rounded) < 0.5 * _error(result, exact)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_row_has_the_same_bits_beside_fewer_and_more(isa, shape, fmt):
    arena, _ = _expert(shape, fmt)
    rows = _rows(max(COUNTS), shape[0])
    all_rows = _outputs(rows, arena, fmt)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for count in COUNTS:
            assert torch.equal(_outputs(rows[-count:], arena, fmt), all_rows[-count:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(96, 256), (43, 97), (70, 2144)], ids=str)
def test_linear_rounds_its_outputs_and_nothing_else(unit, shape, fmt):
    parts = quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), fmt)
    dense = dequantize(parts, fmt, dtype=torch.float64, shape=shape)
    rows = _rows(200, shape[1])
    bias = _rows(1, shape[0], seed=2)[0]
    exact = rows.double() @ dense.T + bias.double()
    result = linear(rows, parts, fmt=fmt, bias=bias)
    assert _error(result, exact.bfloat16().double()) < 4e-4
    for count in COUNTS:
        assert torch.equal(linear(rows[:count], parts, fmt=fmt, bias=bias), result[:count])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_shows_and_stays_in_its_row(isa, bad, fmt):
    arena, _ = _expert((256, 128), fmt)
    rows = _rows(13, 256)
    clean = _outputs(rows, arena, fmt)
    rows[7, 100] = bad
    result = _outputs(rows, arena, fmt)
    assert not result[7].isfinite().any()
    others = torch.arange(13) != 7
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_the_least_weight_is_one_like_the_others(unit, fmt):
    parts = quantize(torch.randn(32, 320, generator=torch.Generator().manual_seed(0)), fmt)
    parts["weight"].view(torch.uint8)[::2] = 0x80 if fmt == "int8" else 0x00
    dense = dequantize(parts, fmt, dtype=torch.float64, shape=(32, 320))
    rows = _rows(40, 320)
    assert (
        _error(linear(rows, parts, fmt=fmt), (rows.double() @ dense.T).bfloat16().double()) < 4e-4
    )


def test_denormal_weights_count_as_zero_in_the_unit(unit):
    weight = torch.full((16, 64), 1e-39, dtype=torch.bfloat16)
    rows = torch.full((8, 64), 1e30, dtype=torch.bfloat16)
    assert torch.equal(linear(rows, {"weight": weight}, fmt="bf16"), torch.zeros(8, 16).bfloat16())


def test_many_bf16_rows_go_to_the_unit_and_no_others(isa):
    for fmt in ("fp32", "bf16", "fp16", "int8", "int4", "nf4"):
        expected = isa == UNIT and fmt in FORMATS
        assert native.has_bf16_products(fmt, torch.bfloat16) == expected
        assert not native.has_bf16_products(fmt, torch.float32)
