"""Routers' choices by native code against plain PyTorch."""

from typing import Any

import pytest
import torch

from outrider.kernels import native
from outrider.kernels.router import ChoiceRule, Router, gate_rows

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What one rounding to the dtype may move, as a part of the value.
ROUNDING = {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}
KINDS: dict[str, dict[str, Any]] = {
    "weights-as-they-are": {"is_renormalised": False},
    "weights-sum-to-one": {"is_renormalised": True},
    "weights-in-fp32": {"is_renormalised": True, "rounds_weights": False},
    "scores-rounded": {"is_renormalised": False, "rounds_scores": True},
    "scores-rounded-and-renormalised": {
        "is_renormalised": True,
        "rounds_scores": True,
        "epsilon": 1e-20,
    },
}


def router_of(num_experts: int, top_k: int, fmt: str, **kind: Any) -> Router:
    gate = torch.zeros(num_experts, 64, dtype=FORMATS[fmt])
    return Router(gate, ChoiceRule(top_k, **kind), fmt=fmt)


@pytest.mark.parametrize("num_experts, top_k", [(64, 6), (8, 2), (5, 5), (1, 1), (100, 8)])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_are_chosen_and_weighed(
    kind: str, fmt: str, num_experts: int, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, num_experts, generator=generator).to(FORMATS[fmt])
    router = router_of(num_experts, top_k, fmt, **KINDS[kind])
    weights, ids = router.choose(logits)
    scores = logits.double().softmax(dim=-1)
    expected = scores.topk(top_k).values
    if KINDS[kind]["is_renormalised"]:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    error = 4 * ROUNDING[fmt]
    # Which experts: those of the largest scores, up to what rounding makes equal.
    assert torch.allclose(
        scores.gather(1, ids), scores.topk(top_k).values, rtol=error, atol=error / num_experts
    )
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert torch.allclose(weights.double(), expected, rtol=error, atol=error / num_experts)
    is_wide = not KINDS[kind].get("rounds_weights", True)
    assert weights.dtype == (torch.float32 if is_wide else FORMATS[fmt])


def test_a_tie_for_the_last_place_is_torch_topks() -> None:
    logits = torch.zeros(3, 64, dtype=torch.bfloat16)
    logits[1, 40:45] = 1.0  # five, of six: the sixth is tied
    logits[2, 20:26] = 1.0  # six of six: no tie
    weights, ids = router_of(64, 6, "bf16", is_renormalised=False, rounds_scores=True).choose(
        logits
    )
    scores = logits.softmax(dim=-1)
    for row in (0, 1):
        assert torch.equal(ids[row], scores[row].topk(6).indices)
    assert sorted(ids[2].tolist()) == [*range(20, 26)]
    assert torch.equal(weights, scores.gather(1, ids))


def test_a_row_of_nans_chooses_distinct_experts_and_spoils_no_other() -> None:
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    router = router_of(64, 6, "fp32", is_renormalised=True)
    _, expected = router.choose(logits)
    logits[0, 5] = torch.nan
    weights, ids = router.choose(logits)
    assert torch.equal(ids[1], expected[1])
    assert weights[0].isnan().all() and not weights[1].isnan().any()
    assert len({*ids[0].tolist()}) == 6 and ids.min() >= 0 and ids.max() < 64


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_gated_by_a_sigmoid(fmt: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 129, generator=generator).to(FORMATS[fmt])
    gate = 3 * torch.randn(5, 1, generator=generator).to(FORMATS[fmt])
    expected = rows.double() * gate.double().sigmoid()
    alone = rows[3:4].clone()
    gate_rows(gate, rows)
    gate_rows(gate[3:4].contiguous(), alone)
    assert torch.allclose(rows.double(), expected, rtol=2 * ROUNDING[fmt], atol=1e-6)
    assert torch.equal(rows[3:4], alone)
