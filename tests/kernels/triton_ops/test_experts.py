"""The Triton expert op equals the plain reference: formats, layouts, edges, decode and prefill."""

import pytest
import torch
from triton_device import DEVICE, DTYPES

from outrider.kernels import expert_mlp as ops
from outrider.kernels.cuda import MAX_GATHERED_TOKENS, DeviceError
from outrider.kernels.quantization import FORMATS, PLAIN_DTYPES, quantize
from outrider.kernels.weights import part_name

# What a GPU does in silence: e^x of a large x is infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

NAN = float("nan")
# Relative RMS error to the reference. Grouped rows of fp16 and bf16 are rounded between the
# projections.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
MANY = MAX_GATHERED_TOKENS + 5
# hidden, intermediate, tokens, top_k, slots: each names its edge.
SHAPES = {
    "one-token": (128, 64, 1, 3, 4),
    "one-expert": (64, 64, 3, 1, 1),
    "every-expert": (64, 64, 2, 4, 4),
    "last-gathered": (64, 64, MAX_GATHERED_TOKENS, 2, 3),
    "first-grouped": (64, 64, MAX_GATHERED_TOKENS + 1, 2, 3),
    "prefill": (128, 64, MANY, 3, 5),
    "prefill-one-expert": (64, 128, 70, 1, 1),
    "prefill-every-expert": (64, 64, MANY, 3, 3),
}
ODD = {"odd-63": (63, 37, 2, 2, 3), "odd-63-prefill": (63, 37, MANY, 2, 3)}


def _moved(value):
    """Tensors, also in tuples and mappings, on the device of the kernels."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(map(_moved, value))
    if isinstance(value, dict):
        return {name: _moved(one) for name, one in value.items()}
    return value


def expert_mlp(*arguments, impl="reference", **options):
    """`ops.expert_mlp`, its result on the CPU."""
    if impl == "reference":
        return ops.expert_mlp(*arguments, impl=impl, **options)
    return ops.expert_mlp(*_moved(arguments), impl=impl, **_moved(options)).cpu()


def expert_outputs(*arguments, impl="reference", out=None, **options):
    """`ops.expert_outputs`, its result on the CPU, in `out` as well."""
    if impl == "reference":
        return ops.expert_outputs(*arguments, impl=impl, out=out, **options)
    result = ops.expert_outputs(*_moved(arguments), impl=impl, out=_moved(out), **_moved(options))
    return result.cpu() if out is None else out.copy_(result.cpu())


def combine(*arguments, impl):
    """`ops.combine`, its result on the CPU."""
    if impl != "triton":
        return ops.combine(*arguments, impl=impl)
    return ops.combine(*_moved(arguments), impl=impl).cpu()


def _arena(hidden, inner, num_slots, fmt, *, is_transposed=False, bias=False, seed=0):
    """num_slots used slots, each followed by one of 0xFF bytes: NaN in every float format."""
    generator = torch.Generator().manual_seed(seed)
    arena = {}
    for name, (n, k) in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        weight = torch.randn(num_slots, n, k, generator=generator) * k**-0.5
        tensors = quantize(weight.mT.contiguous() if is_transposed else weight, fmt)
        arena |= {part_name(name, part): value for part, value in tensors.items()}
        if bias:
            arena[f"{name}_bias"] = torch.randn(num_slots, n, generator=generator)
    for name, value in arena.items():
        spaced = torch.empty(2 * num_slots, *value.shape[1:], dtype=value.dtype)
        spaced.view(torch.uint8).fill_(0xFF)
        spaced[::2] = value
        arena[name] = spaced
    return arena


def _routing(num_tokens, top_k, num_slots):
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack(
        [torch.randperm(num_slots, generator=generator)[:top_k] for _ in range(num_tokens)]
    )
    return ids, torch.rand(num_tokens, top_k, generator=generator)


def _rows(num_tokens, hidden, dtype):
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)


def _error(result, truth):
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def _both(shape, fmt, dtype, **layout):
    hidden, inner, num_tokens, top_k, num_slots = shape
    is_transposed = layout.get("is_transposed", False)
    bias = layout.pop("bias", False)
    arena = _arena(hidden, inner, num_slots, fmt, is_transposed=is_transposed, bias=bias)
    ids, weights = _routing(num_tokens, top_k, num_slots)
    rows = _rows(num_tokens, hidden, dtype)
    return [
        expert_mlp(rows, 2 * ids, weights, arena, fmt=fmt, order=ids, impl=impl, **layout)
        for impl in ("triton", "reference")
    ]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_equals_the_reference_in_halves(shape, fmt, dtype):
    result, truth = _both(shape, fmt, dtype)
    assert result.dtype == dtype
    assert _error(result, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ["one-token", "first-grouped"])
def test_equals_the_reference_in_fp32(case, fmt):
    result, truth = _both(SHAPES[case], fmt, torch.float32)
    assert result.dtype == torch.float32
    assert _error(result, truth) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("shipped_blocks")
@pytest.mark.parametrize("num_tokens", [1, MANY], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", ["fp16", "int8", "int4", "nf4"])
def test_equals_the_reference_with_the_blocks_that_are_shipped(fmt, num_tokens):
    result, truth = _both((64, 64, num_tokens, 1, 2), fmt, torch.float16)
    assert _error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("shape", ODD.values(), ids=list(ODD))
def test_odd_sizes_equal_the_reference(shape, fmt):
    result, truth = _both(shape, fmt, torch.float16)
    assert _error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("num_tokens", [2, MANY], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", ["fp16", "fp32"])
def test_gpt_oss_experts_equal_the_reference(fmt, num_tokens):
    shape = (64, 48, num_tokens, 2, 4)
    layout = {"is_transposed": True, "is_concatenated": False, "bias": True}
    result, truth = _both(shape, fmt, PLAIN_DTYPES[fmt], activation="clamped_swiglu", **layout)
    assert _error(result, truth) < TOLERANCE[PLAIN_DTYPES[fmt]]


@pytest.mark.parametrize("num_tokens", [2, MANY], ids=["decode", "prefill"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"])
def test_other_activations_equal_the_reference(activation, num_tokens):
    shape = (64, 64, num_tokens, 2, 3)
    result, truth = _both(shape, "int8", torch.float32, activation=activation, bias=True)
    assert _error(result, truth) < TOLERANCE[torch.float32]


def test_clamps_are_reached_by_what_the_kernels_are_tested_with():
    # A clamp that no input reaches would be tested by nothing.
    arena = _arena(64, 64, 1, "fp32")
    rows = 40 * _rows(2, 64, torch.float32)
    results = [
        expert_mlp(
            rows,
            torch.zeros(2, 1, dtype=torch.int64),
            torch.ones(2, 1),
            arena,
            fmt="fp32",
            activation="clamped_swiglu",
            impl=impl,
        )
        for impl in ("triton", "reference")
    ]
    gate, up = (rows @ arena["gate_up_proj"][0].T).chunk(2, dim=1)
    assert (gate > 7).any()
    assert (up > 7).any()
    assert (up < -7).any()
    assert _error(*results) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_tokens", [3, 70], ids=["decode", "prefill"])
def test_all_tokens_to_one_expert_while_others_are_empty(num_tokens):
    arena = _arena(64, 64, 4, "int8")
    rows = _rows(num_tokens, 64, torch.float16)
    slots = torch.full((num_tokens, 1), 4)
    result = expert_mlp(rows, slots, torch.ones(num_tokens, 1), arena, fmt="int8", impl="triton")
    truth = expert_mlp(rows, slots, torch.ones(num_tokens, 1), arena, fmt="int8")
    assert _error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("num_tokens", [2, MANY], ids=["decode", "prefill"])
def test_rows_go_where_out_rows_says_and_nowhere_else(num_tokens):
    arena = _arena(63, 33, 2, "fp16")
    rows = _rows(num_tokens, 63, torch.float16)
    out = torch.full((2 * num_tokens + 1, 63), NAN, dtype=torch.float16)
    places = 2 * torch.randperm(num_tokens, generator=torch.Generator().manual_seed(3)) + 1
    token_idx = torch.arange(num_tokens, dtype=torch.int32)
    slots = 2 * (token_idx % 2)
    expert_outputs(
        rows, (token_idx, slots), arena, fmt="fp16", out=out, out_rows=places, impl="triton"
    )
    truth = expert_outputs(rows, (token_idx, slots), arena, fmt="fp16")
    assert _error(out[places], truth) < TOLERANCE[torch.float16]
    assert out[::2].isnan().all()


@pytest.mark.parametrize("num_tokens", [4, MANY], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", ["fp16", "int4"])
def test_waves_and_the_order_of_slots_change_no_bit(fmt, num_tokens):
    arena = _arena(64, 64, 3, fmt)
    rows = _rows(num_tokens, 64, torch.float16)
    token_idx = torch.arange(num_tokens).repeat(3)
    slots = torch.tensor([0, 2, 4]).repeat_interleave(num_tokens)
    whole = expert_outputs(rows, (token_idx, slots), arena, fmt=fmt, impl="triton")
    out = torch.full_like(whole, NAN)
    moved = {name: value.flip(0) for name, value in arena.items()}
    for wave in ([4], [2, 0]):
        chosen = torch.cat([(slots == slot).nonzero().squeeze(1) for slot in wave])
        assignments = (token_idx[chosen], 5 - slots[chosen])
        expert_outputs(rows, assignments, moved, fmt=fmt, out=out, out_rows=chosen, impl="triton")
    assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_combine_equals_the_reference_bit_for_bit_in_any_order(top_k, dtype):
    outputs = _rows(5 * top_k, 1100, dtype).view(5, top_k, 1100)
    outputs[0, 0, :3] = torch.tensor([-0.0, float("inf"), NAN])
    ids, weights = _routing(5, top_k, 9)
    truth = combine(outputs, weights, ids, impl="reference")
    assert torch.equal(combine(outputs, weights, ids, impl="cpu").nan_to_num(), truth.nan_to_num())
    shuffle = torch.randperm(top_k, generator=torch.Generator().manual_seed(4))
    result = combine(outputs[:, shuffle], weights[:, shuffle], ids[:, shuffle], impl="triton")
    assert torch.equal(result.view(torch.uint8), truth.view(torch.uint8)) or torch.equal(
        result.nan_to_num(), truth.nan_to_num()
    )
    assert torch.equal(result.isnan(), truth.isnan())


def test_an_arena_of_more_than_2_to_the_31_elements_is_reached_to_its_end():
    # Untouched pages take no memory: only the last slot is written.
    num_slots, hidden, inner = 1 << 19, 64, 64
    arena = {
        "gate_up_proj": torch.empty(
            num_slots, 2 * inner, hidden, dtype=torch.float16, device=DEVICE
        ),
        "down_proj": torch.empty(num_slots, hidden, inner, dtype=torch.float16, device=DEVICE),
    }
    small = _arena(hidden, inner, 1, "fp16")
    for name, value in arena.items():
        value[-1] = small[name][0]
    assert arena["gate_up_proj"].numel() > 2**31
    for num_tokens in (1, MANY):
        rows = _rows(num_tokens, hidden, torch.float16)
        last = torch.full((num_tokens, 1), num_slots - 1)
        ones = torch.ones(num_tokens, 1)
        result = expert_mlp(rows, last, ones, arena, fmt="fp16", impl="triton")
        truth = expert_mlp(rows, last * 0, ones, small, fmt="fp16")
        assert _error(result, truth) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("num_tokens", [4, MANY], ids=["decode", "prefill"])
def test_the_tolerance_notices_a_wrong_expert_and_a_lost_input(num_tokens):
    arena = _arena(64, 64, 3, "fp16")
    ids, weights = _routing(num_tokens, 2, 3)
    rows = _rows(num_tokens, 64, torch.float16)
    truth = expert_mlp(rows, 2 * ids, weights, arena, fmt="fp16", order=ids)
    swapped = torch.where(ids == 0, 1, torch.where(ids == 1, 0, ids))
    for wrong_rows, wrong_ids in ((rows, swapped), (rows.index_fill(1, torch.tensor(63), 0), ids)):
        wrong = expert_mlp(
            wrong_rows, 2 * wrong_ids, weights, arena, fmt="fp16", order=ids, impl="triton"
        )
        assert _error(wrong, truth) > 10 * TOLERANCE[torch.float16]


def test_nf4_rows_that_straddle_blocks_are_refused():
    arena = _arena(96, 64, 1, "nf4")
    with pytest.raises(DeviceError, match="multiple of 64"):
        expert_mlp(
            _rows(1, 96, torch.float32),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
            arena,
            fmt="nf4",
            impl="triton",
        )
