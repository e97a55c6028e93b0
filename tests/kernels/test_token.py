"""A token's native calls against the formulas in float64, and against calls made one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels import native, token
from outrider.kernels.activation import apply_activation
from outrider.kernels.expert_mlp import combine, expert_outputs
from outrider.kernels.quantization import dequantize, quantize
from outrider.kernels.token import HeadNorm, Projection, RmsNorm, TokenAttention, TokenMlp
from outrider.kernels.weights import ExpertWeights

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")

# Relative RMS error against float64: the rounding of a handful of steps in the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def made(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def projection(
    rows: int, columns: int, *, fmt: str, seed: int, bias: torch.dtype | None = None
) -> tuple[Projection, Tensor]:
    """A projection, and its weight in float64 as the format has it."""
    weight = made(rows, columns, seed=seed, dtype=torch.float32, scale=columns**-0.5)
    parts = quantize(weight, fmt)
    wide = dequantize(parts, fmt, dtype=torch.float64, shape=(rows, columns))
    row = None if bias is None else made(rows, seed=seed + 99, dtype=bias)
    return Projection(parts, fmt, (rows, columns), row), wide


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@DTYPES
@pytest.mark.parametrize("size", [1, 31, 192, 2048])
def test_rms_norm_is_the_formula(size: int, dtype: torch.dtype) -> None:
    x, weight = made(1, size, seed=1, dtype=dtype), made(size, seed=2, dtype=dtype)
    assert error(RmsNorm(weight, 1e-6)(x), normed(x, weight, 1e-6)) < TOLERANCE[dtype]


@DTYPES
def test_residual_takes_a_sum_that_is_rounded_first(dtype: torch.dtype) -> None:
    x, first, second = (made(1, 77, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    expected = x + (first + second)
    token.add_residual(x, first, second)
    assert torch.equal(x, expected)
    expected = x + first
    token.add_residual(x, first)
    assert torch.equal(x, expected)


@DTYPES
@pytest.mark.parametrize("fmt", ["plain", "int8", "int4"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
def test_mlp_is_the_formula(activation: str, fmt: str, dtype: torch.dtype) -> None:
    fmt = PLAIN[dtype] if fmt == "plain" else fmt
    (gate, wide_gate), (up, wide_up) = (projection(72, 128, fmt=fmt, seed=s) for s in (1, 2))
    down, wide_down = projection(128, 72, fmt=fmt, seed=3)
    x = made(1, 128, seed=4, dtype=dtype)
    mlp = TokenMlp(gate, up, down, activation=activation, dtype=dtype)
    gate_up = torch.cat([x.double() @ wide_gate.T, x.double() @ wide_up.T], dim=-1)
    truth = apply_activation(gate_up, activation) @ wide_down.T
    assert error(mlp(x), truth) < 2 * TOLERANCE[dtype] + 2e-3 * (fmt == "int4")


# heads, heads of keys, head_dim, hidden size, what the heads' norm spans, format, tokens in all
WINDOW = 7
CASES = {
    "one-head-odd-size": (1, 1, 6, 10, None, "plain", 5),
    "nano": (6, 6, 32, 192, None, "plain", 40),
    "grouped-heads": (8, 2, 16, 64, None, "plain", 19),
    "norm-a-head": (4, 2, 32, 64, "head", "plain", 9),
    "norm-of-all-heads": (4, 4, 16, 64, "all", "plain", 9),
    "quantised": (4, 4, 32, 128, None, "int8", 9),
    "window": (4, 2, 32, 64, None, "window", 30),
    "past-one-buffer-on-all-threads": (4, 4, 128, 64, None, "plain", 300),
}


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_attention_is_the_formula_token_by_token(case: Any, dtype: torch.dtype) -> None:
    heads, kv_heads, dim, hidden, spans, fmt, num_tokens = case
    window = WINDOW if fmt == "window" else None
    fmt = PLAIN[dtype] if fmt in ("plain", "window") else fmt
    sizes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden)]
    pairs = [
        projection(*size, fmt=fmt, seed=10 + i, bias=dtype) for i, size in enumerate(sizes)
    ] + [projection(hidden, heads * dim, fmt=fmt, seed=14)]
    norm = made(hidden, seed=20, dtype=dtype)
    head_norms: list[HeadNorm | None] = [None, None]
    if spans is not None:
        widths = (dim, dim) if spans == "head" else (heads * dim, kv_heads * dim)
        head_norms = [
            HeadNorm(made(width, seed=21 + i, dtype=dtype), 1e-5) for i, width in enumerate(widths)
        ]
    attention = TokenAttention(
        tuple(one for one, _ in pairs),  # type: ignore[arg-type]
        norm=norm,
        eps=1e-6,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scaling=dim**-0.5,
        window=window,
        query_norm=head_norms[0],
        key_norm=head_norms[1],
    )
    angles = torch.arange(num_tokens)[:, None] * (10.0 ** -torch.arange(dim // 2))
    angles = torch.cat([angles, angles], dim=-1)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.full((1, kv_heads, 512, dim), torch.nan, dtype=dtype) for _ in range(2))
    texts = made(num_tokens, hidden, seed=30, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for place in range(num_tokens):
            x = texts[place : place + 1].clone()
            attention(x, cosines[place], sines[place], keys, values, place)
            found.append(x)
    finally:
        torch.set_num_threads(threads)
    truth = texts.double() + formula(
        normed(texts, norm, 1e-6),
        pairs,
        head_norms,
        (cosines, sines),
        (heads, kv_heads, dim),
        window,
    )
    assert error(torch.cat(found), truth) < 2 * TOLERANCE[dtype]
    assert keys[:, :, num_tokens:].isnan().all(), "rows past the text were written"


def formula(
    x: Tensor, pairs: Any, norms: Any, rotary: Any, sizes: tuple[int, int, int], window: int | None
) -> Tensor:
    """Causal attention of all tokens at once, in float64."""
    heads, kv_heads, dim = sizes

    def projected(index: int) -> Tensor:
        one, wide = pairs[index]
        out = x @ wide.T + (0 if one.bias is None else one.bias.double())
        norm = norms[index] if index < 2 else None
        if norm is not None:
            width = norm.weight.shape[0]
            out = normed(out.view(-1, width), norm.weight, norm.eps).view(out.shape)
        out = out.view(x.shape[0], -1, dim).transpose(0, 1)
        if index < 2:
            half = torch.cat([-out[..., dim // 2 :], out[..., : dim // 2]], dim=-1)
            out = out * rotary[0].double() + half * rotary[1].double()
        return out

    query, key, value = (projected(index) for index in range(3))
    key, value = (one.repeat_interleave(heads // kv_heads, 0) for one in (key, value))
    mask = torch.ones(x.shape[0], x.shape[0]).tril().bool()
    if window is not None:
        mask &= mask.triu(1 - window)
    scores = (query @ key.transpose(1, 2) * dim**-0.5).masked_fill(~mask, -torch.inf)
    mixed = functional.softmax(scores, dim=-1) @ value
    return mixed.transpose(0, 1).reshape(x.shape[0], -1) @ pairs[3][1].T


@DTYPES
@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4", "nf4"])
def test_experts_of_a_token_have_the_bits_of_separate_calls(fmt: str, dtype: torch.dtype) -> None:
    slots, hidden, inner = 9, 128, 64
    arena: dict[str, Tensor] = {}
    for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        each = [
            quantize(made(*shape, seed=slot, dtype=torch.float32, scale=0.1), fmt)
            for slot in range(slots)
        ]
        for part in each[0]:
            key = name if part == "weight" else f"{name}.{part}"
            arena[key] = torch.stack([one[part] for one in each])
    weights = ExpertWeights(arena, hidden, fmt=fmt)
    x = made(1, hidden, seed=50, dtype=dtype)
    slot_ids, topk_ids = torch.tensor([7, 0, 3, 8]), torch.tensor([[40, 2, 63, 11]])
    topk_weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    outputs = expert_outputs(x, (torch.zeros(4).long(), slot_ids), weights, impl="cpu")
    expected = combine(outputs[None], topk_weights, topk_ids, impl="reference")
    order = topk_ids[0].argsort()
    found = token.token_experts(
        x, slot_ids[order].tolist(), topk_weights[0, order].tolist(), weights
    )
    assert torch.equal(found, expected)
    with pytest.raises(native.NativeArgumentError, match="slot"):
        token.token_experts(x, [9], [1.0], weights)
