"""int8 and int4 rows are computed in whole numbers where that is faster: as exact as fp32 sums.

Inputs keep 2^-24 of their block's largest. The plain float kernels (`generic`) stand beside them.
"""

import pytest
import torch

from outrider.kernels import native
from outrider.kernels.linear import linear
from outrider.kernels.quantization import dequantize, quantize

WHOLE = [name for name in ("avx512_bf16", "avx512_vnni", "avx2") if name in native.ISAS]
ROWS, WIDTH = 96, 1024


@pytest.fixture(params=WHOLE)
def isa(request):
    own = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"no {request.param} kernels here")
    yield request.param
    native.use_isa(own)


def _parts(fmt, *, seed=0):
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    parts = quantize(weight, fmt)
    return parts, dequantize(parts, fmt, dtype=torch.float64, shape=(ROWS, WIDTH))


def _inputs(kind, count):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, WIDTH, generator=generator)
    if kind == "heavy-tailed":
        return rows / torch.randn(count, WIDTH, generator=generator)
    if kind == "one-outlier":
        rows[:, 70] = 4096.0
    if kind == "tiny":
        return rows * 1e-24
    return rows


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-outlier", "tiny"])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_errors_are_within_the_bound_of_fp32_sums(isa, fmt, kind, count):
    parts, dense = _parts(fmt)
    rows = _inputs(kind, count)
    truth = rows.double() @ dense.T
    result = linear(rows, parts, fmt=fmt).double()
    # Of each block, half a unit of 2^-23 of its largest input an input; of the sums in fp32 and
    # of the scale, a few roundings of what they hold at most.
    block = 64 if fmt == "int4" else 128
    largest = rows.double().abs().view(count, -1, block).amax(2)
    weights = dense.abs().view(ROWS, -1, block).sum(2)
    inputs = largest @ weights.T * 2**-24
    sums = (rows.double().abs() @ dense.abs().T) * 2**-20
    assert ((result - truth).abs() <= inputs + sums).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_errors_are_those_of_the_float_kernels(isa, fmt, dtype):
    parts, dense = _parts(fmt)
    rows = _inputs("normal", 1).to(dtype)
    truth = rows.double() @ dense.T
    errors = {}
    for name in (isa, "generic"):
        assert native.use_isa(name)
        result = linear(rows.float(), parts, fmt=fmt)
        errors[name] = float((result.double() - truth).norm() / truth.norm())
    assert errors[isa] < 2.5 * errors["generic"]
    assert errors[isa] < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_an_input_that_is_not_finite_shows_and_stays_in_its_row(isa, fmt, bad, dtype):
    parts, _ = _parts(fmt)
    rows = _inputs("normal", 2).to(dtype)
    rows[1, 500] = bad
    result = linear(rows, parts, fmt=fmt)
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_inputs_of_zero_give_zero_and_the_least_weight_is_one_like_the_others(isa, fmt):
    parts, _ = _parts(fmt)
    assert torch.equal(linear(torch.zeros(1, WIDTH), parts, fmt=fmt), torch.zeros(1, ROWS))
    parts["weight"].view(torch.uint8).fill_(0x80 if fmt == "int8" else 0x00)
    dense = dequantize(parts, fmt, dtype=torch.float64, shape=(ROWS, WIDTH))
    rows = _inputs("normal", 1)
    truth = rows.double() @ dense.T
    assert float((linear(rows, parts, fmt=fmt) - truth).norm() / truth.norm()) < 1e-5
