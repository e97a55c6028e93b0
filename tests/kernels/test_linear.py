"""The dense product equals the plain one on dequantised weights, whichever way it is computed."""

import pytest
import torch

from outrider.kernels import native
from outrider.kernels.linear import MAX_NATIVE_TOKENS, linear
from outrider.kernels.quantization import FORMATS, dequantize, quantize

# Relative RMS error against a float64 product, by the dtype of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = {
    "one-row-out": (1, 64),
    "odd": (37, 128),
    "wide": (192, 320),
}
# Widened to fp32 it takes more than one of the 16 MiB blocks.
BLOCKS = (2100, 2048)


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, MAX_NATIVE_TOKENS, MAX_NATIVE_TOKENS + 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_linear_equals_float64_product_of_dequantised_weights(
    shape: tuple[int, int], num_tokens: int, fmt: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = quantize(torch.randn(*shape, generator=generator), fmt)
    rows = torch.randn(2, num_tokens, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    truth = rows.double() @ dequantize(parts, fmt, dtype=torch.float64, shape=shape).T
    truth += bias.double()
    result = linear(rows, parts, fmt=fmt, bias=bias)
    assert result.dtype == dtype
    assert result.shape == (2, num_tokens, shape[0])
    assert _error(result, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4", "nf4"])
def test_linear_in_blocks_equals_the_whole(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_bf16_products", lambda *_: False)  # those need no blocks
    parts = quantize(torch.randn(*BLOCKS, generator=torch.Generator().manual_seed(0)), fmt)
    rows = torch.randn(MAX_NATIVE_TOKENS + 1, BLOCKS[1]).bfloat16()
    truth = rows.double() @ dequantize(parts, fmt, dtype=torch.float64, shape=BLOCKS).T
    assert _error(linear(rows, parts, fmt=fmt), truth) < TOLERANCE[torch.bfloat16]


def test_tolerance_notices_a_wrong_row() -> None:
    parts = quantize(torch.randn(192, 320), "bf16")
    rows = torch.randn(4, 320).bfloat16()
    truth = rows.double() @ parts["weight"].double().T
    wrong = linear(rows, parts, fmt="bf16")
    wrong[0, :8] = 0.0
    assert _error(wrong, truth) > TOLERANCE[torch.bfloat16]
