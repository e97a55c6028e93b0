"""A decoder layer's native calls against formulas in float64, and row by row against themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels import decoder, native
from outrider.kernels.activation import apply_activation
from outrider.kernels.decoder import Attention, GatedMlp, HeadNorm, Pasts, Projection, RmsNorm
from outrider.kernels.expert_mlp import expert_outputs
from outrider.kernels.quantization import dequantize, quantize
from outrider.kernels.ways import Way
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
    decoder.add_residual(x, first, second)
    assert torch.equal(x, expected)
    expected = x + first
    decoder.add_residual(x, first)
    assert torch.equal(x, expected)


@DTYPES
@pytest.mark.parametrize("fmt", ["plain", "int8", "int4"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
def test_mlp_is_the_formula(activation: str, fmt: str, dtype: torch.dtype) -> None:
    fmt = PLAIN[dtype] if fmt == "plain" else fmt
    (gate, wide_gate), (up, wide_up) = (projection(72, 128, fmt=fmt, seed=s) for s in (1, 2))
    down, wide_down = projection(128, 72, fmt=fmt, seed=3)
    x = made(1, 128, seed=4, dtype=dtype)
    mlp = GatedMlp(gate, up, down, activation=activation, dtype=dtype)
    gate_up = torch.cat([x.double() @ wide_gate.T, x.double() @ wide_up.T], dim=-1)
    truth = apply_activation(gate_up, activation) @ wide_down.T
    assert error(mlp(x, 1), truth) < 2 * TOLERANCE[dtype] + 2e-3 * (fmt == "int4")


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
    attention = Attention(
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
    texts = made(num_tokens, hidden, seed=30, dtype=dtype)
    one_by_one, cache = attended(attention, texts, (cosines, sines), [1] * num_tokens, kv_heads)
    pieces = [num_tokens // 3, 1, num_tokens - num_tokens // 3 - 1]
    in_pieces, _ = attended(attention, texts, (cosines, sines), pieces, kv_heads)
    assert torch.equal(in_pieces, one_by_one), "a row's bits depend on its past alone"
    truth = texts.double() + formula(
        normed(texts, norm, 1e-6),
        pairs,
        head_norms,
        (cosines, sines),
        (heads, kv_heads, dim),
        window,
    )
    assert error(one_by_one, truth) < 2 * TOLERANCE[dtype]
    assert cache[:, :, num_tokens:].isnan().all(), "rows past the text were written"


def attended(
    attention: Attention,
    texts: Tensor,
    rotary: tuple[Tensor, Tensor],
    pieces: list[int],
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Attention's output for a text run in `pieces`, and the buffer of its keys and values."""
    cosines, sines = rotary
    cache = torch.full((2, kv_heads, 512, cosines.shape[1]), torch.nan, dtype=texts.dtype)
    found, length = texts.clone(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for piece in pieces:
            x = found[length : length + piece]
            past = (cache[0].data_ptr(), cache[1].data_ptr(), 512, length, 0, piece)
            pasts = Pasts(np.array([[past]]), num_streamed=0)
            attention(x, cosines[length:], sines[length:], pasts, layer_idx=0)
            length += piece
    finally:
        torch.set_num_threads(threads)
    return found, cache


@DTYPES
def test_rows_of_several_texts_side_by_side_are_those_of_each_alone(dtype: torch.dtype) -> None:
    """The same three texts, of which one decodes and two are prefilled, apart and in one pass."""
    heads, dim, hidden = 4, 16, 64
    sizes = [(heads * dim, hidden)] * 3 + [(hidden, heads * dim)]
    attention = Attention(
        tuple(projection(*size, fmt=PLAIN[dtype], seed=i)[0] for i, size in enumerate(sizes)),  # type: ignore[arg-type]
        norm=made(hidden, seed=20, dtype=dtype),
        eps=1e-6,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scaling=dim**-0.5,
    )
    lengths, counts = [5, 0, 2], [1, 9, 6]
    x = made(sum(counts), hidden, seed=30, dtype=dtype)
    angles = made(sum(counts), dim, seed=31, dtype=dtype)
    rotary = angles.cos(), angles.sin()
    starts = [0, 1, 10]

    def run(together: bool) -> list[Tensor]:
        caches = [made(2, heads, 16, dim, seed=40 + i, dtype=dtype) for i in range(3)]
        out = x.clone()
        calls = [range(3)] if together else [range(i, i + 1) for i in range(3)]
        for texts in calls:
            begin, end = starts[texts[0]], starts[texts[-1]] + counts[texts[-1]]
            table = [
                (
                    *(half.data_ptr() for half in caches[i]),
                    16,
                    lengths[i],
                    starts[i] - begin,
                    counts[i],
                )
                for i in texts
            ]
            rows = slice(begin, end)
            pasts = Pasts(np.array([table]), num_streamed=int(texts[0] == 0))
            attention(out[rows], rotary[0][rows], rotary[1][rows], pasts, layer_idx=0)
        return [out, *caches]

    for found, expected in zip(run(together=True), run(together=False), strict=True):
        assert torch.equal(found, expected)


# Counts of rows on both sides of each bound in the native code, and of its multiples.
COUNTS = (2, 3, 4, 5, 8, 9, 16, 17, 40)


WAYS = pytest.mark.parametrize("way", [Way.STREAMED, Way.TILED], ids=["streamed", "tiled"])


@WAYS
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16", "int8", "int4", "nf4"])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(fmt: str, isa: str, way: Way) -> None:
    chosen = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        one, _ = projection(70, 640, fmt=fmt, seed=1, bias=torch.bfloat16)
        product = decoder.product(one)
        x = made(max(COUNTS), 640, seed=2, dtype=torch.bfloat16)
        share = int(way is Way.STREAMED)
        alone = torch.cat([product(x[row : row + 1], 1, share) for row in range(len(x))])
        for count in COUNTS:
            assert torch.equal(product(x[:count], count, share * count), alone[:count]), count
        if way is Way.STREAMED:
            beside = product(x, len(x), 3)
            assert torch.equal(beside[:3], alone[:3])
    finally:
        native.use_isa(chosen)


@WAYS
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4", "nf4"])
def test_a_row_of_an_expert_has_the_same_bits_in_any_company(fmt: str, isa: str, way: Way) -> None:
    chosen = native.isa()
    if not native.use_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        weights = arena_of(3, 128, 192, fmt=fmt)
        x = made(max(COUNTS), 128, seed=3, dtype=torch.bfloat16)
        alone = torch.cat([outputs_of(weights, x[row : row + 1], way) for row in range(len(x))])
        for count in COUNTS:
            assert torch.equal(outputs_of(weights, x[:count], way), alone[:count]), count
    finally:
        native.use_isa(chosen)


def test_a_second_thread_changes_no_bit_of_an_expert() -> None:
    """On AVX2 a thread once took the sums of an int4 row's last groups before another had them."""
    chosen, threads = native.isa(), torch.get_num_threads()
    weights = arena_of(3, 128, 192, fmt="int4")
    x = made(2, 128, seed=3, dtype=torch.bfloat16)
    if not native.use_isa("avx2"):
        pytest.skip("no avx2 here")
    try:
        torch.set_num_threads(1)
        expected = outputs_of(weights, x)
        torch.set_num_threads(2)
        assert all(torch.equal(outputs_of(weights, x), expected) for _ in range(2000))
    finally:
        native.use_isa(chosen)
        torch.set_num_threads(threads)


def outputs_of(weights: ExpertWeights, x: Tensor, way: Way = Way.BY_COUNT) -> Tensor:
    """Every row by the expert in slot 1, and one by another beside them."""
    token_idx = torch.tensor([*range(len(x)), 0])
    slot_ids = torch.tensor([1] * len(x) + [2])
    return expert_outputs(x, (token_idx, slot_ids), weights, impl="cpu", way=way)[:-1]


def arena_of(slots: int, hidden: int, inner: int, *, fmt: str) -> ExpertWeights:
    """Experts of random weights in `fmt`."""
    arena: dict[str, Tensor] = {}
    for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        each = [
            quantize(made(*shape, seed=slot, dtype=torch.float32, scale=0.1), fmt)
            for slot in range(slots)
        ]
        for part in each[0]:
            key = name if part == "weight" else f"{name}.{part}"
            arena[key] = torch.stack([one[part] for one in each])
    return ExpertWeights(arena, hidden, fmt=fmt)


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
