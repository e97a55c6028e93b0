"""Every family: what transformers computes, and the same bits whatever is resident or foretold."""

import engines
import numpy as np
import pytest
import torch
from engines import WrongPredictor, prompt_of
from families import FAMILIES

from outrider.predictors.random import RandomPredictor
from outrider.runtime.engine import Engine
from outrider.runtime.experts.arithmetic import KernelArithmetic, ModuleArithmetic
from outrider.runtime.models.checkpoint_experts import CheckpointExperts
from outrider.runtime.request import SamplingParams

PROMPT = prompt_of(24)  # longer than every family's sliding window
MAX_TOKENS = 6
# Relative error of a row of logits. fp32 rows are within 3e-6 here. In bf16 transformers itself has
# several summation orders; a row is within 1 to 5 %, and one in which a near-tie tipped to another
# expert is further off, so that the median over rows is held to this.
FP32_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.06

family_names = pytest.mark.parametrize("family", FAMILIES)


def all_experts(loaded) -> int:
    return loaded.shape.num_routed_experts


def overconfident(loaded):
    return RandomPredictor(loaded.shape, seed=3, confidence=0.95)


# slots of (top_k, all), options, predictor made on purpose
SETTINGS = {
    "one-slot": (lambda k, n: 1, {"prefetch": "off"}, None),
    "k-slots-lookahead": (lambda k, n: k, {"prefetch": "on", "predictor": "lookahead"}, None),
    "tenth-auto": (lambda k, n: max(1, n // 10), {"prefetch": "auto"}, None),
    "tenth-frequent": (
        lambda k, n: max(1, n // 10),
        {"prefetch": "on", "predictor": "frequent"},
        None,
    ),
    "half-lookahead": (lambda k, n: n // 2, {"prefetch": "on", "predictor": "lookahead"}, None),
    "half-random": (lambda k, n: n // 2, {"prefetch": "on"}, overconfident),
    "half-wrong": (lambda k, n: n // 2, {"prefetch": "on"}, WrongPredictor),
    "half-none": (lambda k, n: n // 2, {"prefetch": "on", "predictor": "none"}, None),
    "half-lru": (lambda k, n: n // 2, {"prefetch": "off", "eviction": "lru"}, None),
    "all-wrong": (lambda k, n: n, {"prefetch": "on"}, WrongPredictor),
}
BF16_SETTINGS = ("one-slot", "tenth-auto", "half-lookahead", "half-wrong")


@pytest.fixture(scope="session")
def resident(models):
    """(family, dtype) -> what the engine generates with all experts in memory, made once."""
    made = {}

    def generated(family: str, dtype: str) -> engines.Generated:
        if (family, dtype) not in made:
            with models.engine(family, dtype=dtype, prefetch="off") as engine:
                made[family, dtype] = engines.generate(engine, [PROMPT], max_tokens=MAX_TOKENS)
        return made[family, dtype]

    return generated


@family_names
def test_loads_true_layout(models, family):
    # The files were saved by transformers: one tensor an expert and projection, or its own fusion.
    folder = models.checkpoint(family)
    with Engine.from_pretrained(folder, expert_memory="50%", device="cpu") as engine:
        (result,) = engine.generate(PROMPT, SamplingParams(max_tokens=2, temperature=0.0))
        assert not engine.loaded.unused_tensors
        assert isinstance(engine.tier.source, CheckpointExperts)
        arithmetic = engine.tier.executor.arithmetic
    assert len(result.token_ids) == 2
    # gpt_oss clamps its activation in a way of its own; all others are served by the kernels.
    expected = ModuleArithmetic if family == "gpt_oss" else KernelArithmetic
    assert isinstance(arithmetic, expected)


@family_names
def test_tokens_equal_transformers_in_fp32(models, resident, family):
    (token_ids,) = resident(family, "fp32").token_ids
    expected = models.reference(family).generate(PROMPT, max_tokens=MAX_TOKENS)
    assert token_ids == expected
    assert len(set(token_ids)) > 1, "one token repeated would be equal for the wrong reasons"


@family_names
def test_logits_equal_transformers_in_fp32(models, resident, family):
    # The prefill's and every decode step's, against one pass over all tokens.
    generated = resident(family, "fp32")
    got = torch.cat(generated.logits)
    everything = models.reference(family).logits(PROMPT + generated.token_ids[0])
    want = everything[len(PROMPT) - 1 : -1]
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < FP32_TOLERANCE
    torch.testing.assert_close(got, want, rtol=FP32_TOLERANCE, atol=1e-5 * float(want.abs().max()))


@family_names
def test_logits_are_near_transformers_in_bf16(models, family):
    prompts = [prompt_of(6, seed=seed) for seed in range(8)]
    with models.engine(family, dtype="bf16", prefetch="off") as engine:
        (got,) = engines.generate(engine, prompts, max_tokens=1).logits
    reference = models.reference(family, dtype="bf16")
    want = torch.stack([reference.logits(prompt)[-1] for prompt in prompts])
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < BF16_TOLERANCE


def check_same_bits(models, resident, family, dtype, setting):
    slots, options, make_predictor = SETTINGS[setting]
    expected = resident(family, dtype)
    shape = models.loaded(family, dtype=dtype).shape
    num_slots = slots(shape.top_k, shape.num_routed_experts)
    with models.engine(
        family,
        dtype=dtype,
        num_slots=num_slots,
        make_predictor=make_predictor,
        # What is read ahead on purpose is there at once, so that it does not hang on the disk's
        # speed whether it is read at all.
        is_instant=make_predictor is not None,
        **options,
    ) as engine:
        generated = engines.generate(engine, [PROMPT], max_tokens=MAX_TOKENS)
        engine.tier.executor.cache.check()
        assert engine.tier.num_slots == num_slots
        assert not engine.tier.executor.is_degraded
    traffic = generated.traffic
    traffic.check()
    if num_slots < shape.num_routed_experts:
        assert traffic.misses > 0
    if make_predictor is not None and num_slots < shape.num_routed_experts:
        assert traffic.prefetch_issued > 0, "nothing was read ahead, so nothing was tried"
    if options["prefetch"] == "off":
        assert traffic.prefetch_issued == 0
    assert generated.token_ids == expected.token_ids
    assert len(generated.logits) == len(expected.logits)
    for got, want in zip(generated.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


@family_names
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_bit_identical_in_fp32(models, resident, family, setting):
    check_same_bits(models, resident, family, "fp32", setting)


@family_names
@pytest.mark.parametrize("setting", BF16_SETTINGS)
def test_logits_are_bit_identical_in_bf16(models, resident, family, setting):
    check_same_bits(models, resident, family, "bf16", setting)


@pytest.mark.parametrize("setting", ["one-slot", "half-wrong"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "nf4"])
def test_packed_formats_are_bit_identical_too(models, fmt, setting):
    slots, options, make_predictor = SETTINGS[setting]
    shape = models.loaded("qwen2_moe").shape
    with models.engine("qwen2_moe", format=fmt, prefetch="off") as engine:
        expected = engines.generate(engine, [PROMPT], max_tokens=MAX_TOKENS)
    with models.engine(
        "qwen2_moe",
        format=fmt,
        num_slots=slots(shape.top_k, shape.num_routed_experts),
        make_predictor=make_predictor,
        **options,
    ) as engine:
        generated = engines.generate(engine, [PROMPT], max_tokens=MAX_TOKENS)
    assert all(map(torch.equal, generated.logits, expected.logits))


def test_the_wrong_predictor_is_wrong(models):
    # What the tests above lean on: it prefetches, and less of it is of use than with foresight.
    shares = []
    for make_predictor in (None, WrongPredictor):
        with models.engine(
            "qwen3_moe",
            num_slots=16,
            prefetch="on",
            make_predictor=make_predictor,
            is_instant=True,
        ) as engine:
            traffic = engines.generate(engine, [PROMPT], max_tokens=12).traffic
        assert traffic.prefetch_issued > 0
        shares.append(traffic.prefetch_used / traffic.prefetch_issued)
    foretold, wrong = shares
    assert wrong < foretold


def test_router_ids_reach_the_kernels_unsorted(models):
    # deepseek_v3 asks torch.topk for unsorted ids; the combine's order must not depend on them.
    loaded = models.loaded("deepseek_v3")
    with models.engine("deepseek_v3") as engine:
        seen = []
        forward = engine.tier.executor.forward
        for layer in loaded.layers:
            layer.experts.outrider_function = lambda *call: seen.append(call[3]) or forward(*call)
        engine.generate(PROMPT, SamplingParams(max_tokens=1, temperature=0.0))
    ids = torch.cat(seen).numpy()
    assert (np.diff(ids, axis=1) < 0).any()


def test_bits_are_the_same_on_two_threads_too(models):
    # They may differ from those on one thread, not between budgets.
    torch.set_num_threads(2)
    try:
        logits = []
        for num_slots in (1, 30):
            with models.engine("qwen2_moe", num_slots=num_slots) as engine:
                generated = engines.generate(engine, [PROMPT[:8]], max_tokens=1)
            logits.append(torch.cat(generated.logits))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("family", "fmt", "tolerance"),
    [
        *[pytest.param(family, "int8", 0.05, id=f"{family}-int8") for family in FAMILIES],
        *[
            pytest.param(family, fmt, tolerance, id=f"{family}-{fmt}")
            for family in ("gpt_oss", "deepseek_v3")
            for fmt, tolerance in (("bf16", 0.05), ("int4", 0.4), ("nf4", 0.4))
        ],
    ],
)
def test_packed_experts_are_the_same_model(models, family, fmt, tolerance):
    # A projection stored the wrong way round, or a bias left out, is off by about 1. int4 and nf4
    # take 10 % from weights as wide as these, and tip routers.
    prompts = [prompt_of(4, seed=seed) for seed in range(8)]
    with models.engine(family, prefetch="off") as engine:
        (want,) = engines.generate(engine, prompts, max_tokens=1).logits
    with models.engine(family, format=fmt, num_slots=3) as engine:
        assert engine.tier.source.format == fmt
        (got,) = engines.generate(engine, prompts, max_tokens=1).logits
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).median() < tolerance
