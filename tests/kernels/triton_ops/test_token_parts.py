"""The Triton parts of a decoder's token: norm, attention, choice, each against plain PyTorch."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from triton_device import DEVICE, DTYPES

from outrider.kernels.choice import choose
from outrider.kernels.decode_attention import (
    BLOCK_KEYS,
    NUM_SPLITS,
    DevicePasts,
    Heads,
    attend,
)
from outrider.kernels.residual_norm import residual_norm
from outrider.kernels.router import ChoiceRule

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
MANY = 2 * BLOCK_KEYS * NUM_SPLITS + 5


def _rows(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(result, truth):
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def _plain_norm(x, weight, eps, dtype):
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)
    return (weight.float() * normed.float()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_added", [0, 1, 2])
def test_residual_and_norm(num_added, dtype):
    x, *added = (_rows(3, 100, dtype=dtype, seed=seed) for seed in range(1 + num_added))
    weight = _rows(100, dtype=dtype, seed=9)
    truth = x + sum(added[1:], start=added[0]) if added else x
    device_x, out = x.to(DEVICE), torch.full((3, 100), float("nan"), dtype=dtype, device=DEVICE)
    moved = tuple(one.to(DEVICE) for one in added)
    residual_norm(device_x, moved, weight.to(DEVICE), 1e-5, out=out)
    assert torch.equal(device_x.cpu(), truth)
    assert _error(out.cpu(), _plain_norm(truth, weight, 1e-5, dtype)) < TOLERANCE[dtype]


class _Sequences:
    """Sequences with random pasts, each in buffers of its own."""

    def __init__(self, lengths, kv_heads, dim, dtype, num_layers=2):
        self.lengths = lengths
        self.capacities = [length + 1 + 3 * place for place, length in enumerate(lengths)]
        self.buffers = [
            [
                [
                    _rows(kv_heads, capacity, dim, dtype=dtype, seed=7 * layer + place + which)
                    for which in range(2)
                ]
                for place, capacity in enumerate(self.capacities)
            ]
            for layer in range(num_layers)
        ]
        self.on_device = [
            [[one.to(DEVICE) for one in pair] for pair in layer] for layer in self.buffers
        ]

    def pasts(self, positions):
        addresses = [
            [[one.data_ptr() for one in pair] for pair in layer] for layer in self.on_device
        ]
        return DevicePasts(
            *(
                torch.tensor(values, dtype=torch.int64, device=DEVICE)
                for values in (positions, self.lengths, self.capacities, addresses)
            )
        )


def _turned(x, cosines, sines, dtype):
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return ((x * cosines).to(dtype) + (rotated * sines).to(dtype)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "dim", "window", "norm"),
    [
        pytest.param(2, 2, 32, 0, None, id="every-head-its-own-keys"),
        pytest.param(4, 2, 24, 0, "head", id="groups-odd-size-head-norm"),
        pytest.param(2, 1, 16, 40, None, id="window"),
        pytest.param(2, 2, 16, 0, "all", id="norm-over-all-heads"),
    ],
)
def test_attention(num_heads, kv_heads, dim, window, norm, dtype):
    lengths = [0, 3, BLOCK_KEYS - 1, MANY]
    positions = [5, 3, 40, MANY]
    sequences = _Sequences(lengths, kv_heads, dim, dtype)
    qkv = _rows(4, (num_heads + 2 * kv_heads) * dim, dtype=dtype, seed=3)
    angles = torch.rand(MANY + 1, dim // 2, generator=torch.Generator().manual_seed(4)).repeat(1, 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = {None: (None, None), "head": (dim, dim), "all": (num_heads * dim, kv_heads * dim)}
    norms = [
        None if width is None else 1 + 0.1 * _rows(width, dtype=dtype, seed=width)
        for width in weights[norm]
    ]
    heads = Heads(
        num_heads,
        kv_heads,
        dim,
        scaling=0.2,
        window=window,
        query_norm=None if norms[0] is None else norms[0].to(DEVICE),
        key_norm=None if norms[1] is None else norms[1].to(DEVICE),
        eps=1e-6,
    )
    out = torch.full((4, num_heads * dim), float("nan"), dtype=dtype, device=DEVICE)
    turns = (cosines.to(DEVICE), sines.to(DEVICE))
    attend(qkv.to(DEVICE), heads, sequences.pasts(positions), turns, layer_idx=1, out=out)

    for place, (length, position) in enumerate(zip(lengths, positions, strict=True)):
        query, key, value = qkv[place].split([num_heads * dim, kv_heads * dim, kv_heads * dim])
        parts = []
        for one, weight in zip((query, key), norms, strict=True):
            shaped = one if norm == "all" else one.view(-1, dim)
            if weight is not None:
                shaped = _plain_norm(shaped, weight, 1e-6, dtype)
            parts.append(
                _turned(shaped.reshape(-1, dim), cosines[position], sines[position], dtype)
            )
        query, key = parts
        keys, values = (one.clone() for one in sequences.buffers[1][place])
        keys[:, length], values[:, length] = key, value.view(-1, dim)
        for mine, kept in zip(sequences.on_device[1][place], (keys, values), strict=True):
            assert _error(mine[:, length].cpu(), kept[:, length]) < TOLERANCE[dtype]
            untouched = torch.arange(mine.shape[1]) != length
            assert torch.equal(mine.cpu()[:, untouched], kept[:, untouched])
        first = max(0, length + 1 - window) if window else 0
        groups = num_heads // kv_heads
        truth = functional.scaled_dot_product_attention(
            query.double()[:, None],
            keys[:, first : length + 1].double().repeat_interleave(groups, 0),
            values[:, first : length + 1].double().repeat_interleave(groups, 0),
            scale=0.2,
        )
        assert _error(out[place].cpu(), truth.flatten()) < TOLERANCE[dtype], place


def test_a_row_has_the_same_bits_alone_and_in_company():
    dtype, dim = DTYPES[-1], 16
    lengths = [MANY, 2, 50]
    sequences = _Sequences(lengths, 2, dim, dtype)
    qkv = _rows(3, 6 * dim, dtype=dtype).to(DEVICE)
    turns = (torch.ones(MANY + 1, dim, dtype=dtype, device=DEVICE),) * 2
    heads, pasts = Heads(2, 2, dim, scaling=0.3), sequences.pasts(lengths)
    together = torch.empty(3, 2 * dim, dtype=dtype, device=DEVICE)
    attend(qkv, heads, pasts, turns, layer_idx=0, out=together)
    for row in range(3):
        own = slice(row, row + 1)
        one = DevicePasts(
            pasts.positions[own], pasts.lengths[own], pasts.capacities[own],
            pasts.addresses[:, own].contiguous(),
        )  # fmt: skip
        alone = torch.empty(1, 2 * dim, dtype=dtype, device=DEVICE)
        attend(qkv[own], heads, one, turns, layer_idx=0, out=alone)
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        ChoiceRule(6, is_renormalised=False, rounds_scores=True),
        ChoiceRule(3, is_renormalised=True, rounds_scores=True, epsilon=1e-20),
        ChoiceRule(2, is_renormalised=True, rounds_weights=False),
        ChoiceRule(4, is_renormalised=False),
    ],
    ids=["deepseek", "deepseek-normed", "mixtral", "qwen"],
)
def test_choice(rule, dtype):
    logits = 3 * _rows(5, 60, dtype=dtype)
    ids = torch.full((5, rule.top_k), -1, device=DEVICE)
    weights = torch.full((5, rule.top_k), float("nan"), device=DEVICE)
    choose(logits.to(DEVICE), rule, ids=ids, weights=weights)
    scores = logits.float().softmax(-1)
    if rule.rounds_scores:
        scores = scores.to(dtype)
    # Of equal scores the lowest id: a stable order of descending scores.
    order = np.argsort(-scores.double().numpy(), axis=1, kind="stable")[:, : rule.top_k]
    assert np.array_equal(ids.cpu().numpy(), order)
    truth = scores.gather(1, torch.from_numpy(order))
    if rule.is_renormalised:
        truth = truth / (truth.sum(-1, keepdim=True) + rule.epsilon)
    if rule.rounds_weights:
        truth = truth.to(dtype)
    step = 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
    assert torch.allclose(weights.cpu(), truth.float(), rtol=2e-6 + step, atol=0)


def test_a_choice_of_nan_is_of_distinct_experts():
    logits = torch.full((1, 8), float("nan"), device=DEVICE)
    logits[0, 3] = 1.0
    ids = torch.empty(1, 4, dtype=torch.int64, device=DEVICE)
    weights = torch.empty(1, 4, device=DEVICE)
    choose(logits, ChoiceRule(4, is_renormalised=False), ids=ids, weights=weights)
    chosen = ids[0].tolist()
    assert len(set(chosen)) == 4
    assert all(0 <= one < 8 for one in chosen)
