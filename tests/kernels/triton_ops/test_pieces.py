"""What the Triton kernels are made of: dense products, and the decoding of packed weights."""

import pytest
import torch
import triton
import triton.language as tl
from triton_device import DEVICE, DTYPES

from outrider.kernels.cuda import MAX_GATHERED_TOKENS
from outrider.kernels.gathered import levels_of
from outrider.kernels.linear import linear
from outrider.kernels.quantization import FORMATS, dequantize, quantize
from outrider.kernels.weight_tile import (
    load_bytes,
    load_scales,
    nibble_inputs,
    unpack_bytes,
    unpack_groups,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}


@triton.jit
def _decode_kernel(
    w_ptr, s_ptr, levels_ptr, out_ptr, K, FORMAT: tl.constexpr, ORDERED: tl.constexpr
):
    """out [N, K] fp32: the weights as the kernels see them, in two ways; grid (N, groups)."""
    row = tl.program_id(0) + tl.arange(0, 1)
    group = tl.program_id(1) + tl.arange(0, 1)
    num_groups = (K + 63) // 64
    is_row, is_group = row >= 0, group < num_groups
    packed = load_bytes(w_ptr, row.to(tl.int64), is_row, group, is_group, num_groups)
    scales = load_scales(s_ptr, row.to(tl.int64), is_row, group, is_group, num_groups)
    k = tl.program_id(1) * 64 + tl.arange(0, 64)
    if ORDERED:
        whole = tl.reshape(unpack_groups(packed, levels_ptr, FORMAT, 1) * scales, (64,))
        tl.store(out_ptr + tl.program_id(0) * K + k, whole, mask=k < K)
    else:
        low, high = unpack_bytes(packed, levels_ptr, FORMAT)
        low_k, high_k = nibble_inputs(group, FORMAT)
        start = out_ptr + tl.program_id(0) * K
        tl.store(start + low_k, tl.reshape(low, (1, 32)) * scales, mask=low_k < K)
        tl.store(start + high_k, tl.reshape(high, (1, 32)) * scales, mask=high_k < K)


def _decoded(parts, fmt, n, k, *, ordered):
    out = torch.full((n, k), float("nan"), device=DEVICE)
    parts = {name: part.to(DEVICE) for name, part in parts.items()}
    scale = parts["absmax" if fmt == "nf4" else "scale"]
    groups = (k + 63) // 64
    levels = levels_of(out.device)
    _decode_kernel[(n, groups)](parts["weight"], scale, levels, out, k, FORMAT=fmt, ORDERED=ordered)
    return out.cpu()


# bitsandbytes 0.48 calls a check that torch 2.13 has deprecated.
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")
@pytest.mark.parametrize("ordered", [False, True], ids=["gathered", "grouped"])
def test_nf4_is_decoded_as_bitsandbytes_does_bit_for_bit(ordered):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(9, 192, generator=torch.Generator().manual_seed(7))
    weight[0, :64] = 0.0
    weight[1, :64] *= 1e-38
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    parts = {"weight": packed.flatten(), "absmax": state.absmax}
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(_decoded(parts, "nf4", 9, 192, ordered=ordered), theirs)


@pytest.mark.parametrize("ordered", [False, True], ids=["gathered", "grouped"])
@pytest.mark.parametrize("k", [64, 100, 192])
def test_int4_is_decoded_as_defined_bit_for_bit(k, ordered):
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(7))
    parts = quantize(weight, "int4")
    truth = dequantize(parts, "int4", dtype=torch.float32, shape=(5, k))
    assert torch.equal(_decoded(parts, "int4", 5, k, ordered=ordered), truth)


@pytest.mark.parametrize("num_tokens", [0, 1, MAX_GATHERED_TOKENS, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_equals_the_reference(fmt, dtype, num_tokens):
    generator = torch.Generator().manual_seed(0)
    parts = quantize(torch.randn(70, 128, generator=generator), fmt)
    rows = torch.randn(num_tokens, 128, generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype)
    truth = linear(rows, parts, fmt=fmt, bias=bias, impl="reference").double()
    parts = {name: part.to(DEVICE) for name, part in parts.items()}
    result = linear(rows.to(DEVICE), parts, fmt=fmt, bias=bias.to(DEVICE), impl="triton").cpu()
    assert result.dtype == dtype
    assert result.shape == (num_tokens, 70)
    assert float((result.double() - truth).norm()) <= TOLERANCE[dtype] * float(truth.norm())
