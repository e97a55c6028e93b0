"""nf4 is bitsandbytes' own, bit for bit: what is stored and what comes back."""

import pytest
import torch

from outrider.kernels.quantization import dequantize, quantize

functional = pytest.importorskip("bitsandbytes.functional")


# bitsandbytes 0.48 calls a check that torch 2.13 has deprecated.
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (3, 128)], ids=str)
def test_nf4_equals_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    weight[0, :64] = 0.0
    parts = quantize(weight, "nf4")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(parts["weight"].flatten(), packed.flatten())
    assert torch.equal(parts["absmax"].flatten(), state.absmax.flatten())
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(parts, "nf4", dtype=dtype, shape=shape), theirs)


def test_int8_is_the_plain_definition() -> None:
    weight = torch.randn(12, 100, generator=torch.Generator().manual_seed(8))
    parts = quantize(weight, "int8")
    scale = weight.abs().amax(dim=1) / 127
    assert torch.allclose(parts["scale"], scale)
    error = (dequantize(parts, "int8", dtype=torch.float32) - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_a_row_of_zeros_stays_zero(fmt: str) -> None:
    parts = quantize(torch.zeros(2, 64), fmt)
    assert torch.equal(dequantize(parts, fmt, dtype=torch.float32), torch.zeros(2, 64))
