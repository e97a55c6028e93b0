"""The native way through a decoder against the model's own modules, and against itself alone."""

import re
from typing import Any

import pytest
import torch
from engines import prompt_of
from families import FAMILIES as ALL_FAMILIES

from outrider.kernels import native
from outrider.kernels.decoder import GatedMlp, RmsNorm
from outrider.runtime.acquisition import Acquisition
from outrider.runtime.engine import Engine
from outrider.runtime.models import native_decoder
from outrider.runtime.models.attention import SequenceKv, Span
from outrider.runtime.models.llama_form import FAMILIES
from outrider.runtime.models.native_decoder import NativeDecoder
from outrider.runtime.request import SamplingParams
from outrider.runtime.runner import ModelRunner
from outrider.runtime.scheduler import BatchLimits, Scheduler

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
# Relative error of a row of logits; in half precision a near tie may tip to another expert, hence
# the median there.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.04, "fp16": 0.01}


def decoded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, *, is_native: bool
) -> tuple[list[int], torch.Tensor]:
    """Tokens decoded, and logits of all rows of one text, by the native way or the model's own."""
    runner, logits = engine._runner, []
    honest = ModelRunner.run

    def run(self: ModelRunner, *arguments: Any, **named: Any) -> Any:
        output = honest(self, *arguments, **named)
        logits.append(output.logits)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", run)
        if not is_native:
            patch.setattr(runner, "_decoder", None)
        engine.logprobs([prompt_of(24)])
        (result,) = engine.generate([prompt_of(7)], GREEDY)
    return result.token_ids, logits[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_native_way_computes_what_the_model_does(
    models: Any, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.engine(family, dtype=dtype) as engine:
        assert engine._runner._decoder is not None
        tokens, found = decoded(engine, monkeypatch, is_native=True)
        expected, truth = decoded(engine, monkeypatch, is_native=False)
    errors = (found - truth).norm(dim=1) / truth.norm(dim=1)  # [24]
    assert errors.median() < TOLERANCE[dtype]
    if dtype == "fp32":
        assert tokens == expected and errors.max() < TOLERANCE[dtype]


# Lengths of texts that are run side by side, and how many prompt tokens may run in one pass.
TEXT_LENGTHS, PIECE = (7, 1, 23, 12), 5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_text_gets_the_same_bits_alone_and_in_any_company(
    models: Any, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others decode and are prefilled beside it, and its prompt is run in pieces."""
    texts = [prompt_of(length) for length in TEXT_LENGTHS]
    with models.engine(family, dtype=dtype) as engine:
        alone = [engine.generate([text], GREEDY)[0] for text in texts]
        logprobs = [engine.logprobs([text])[0] for text in texts]
        beside = engine.logprobs(texts)
        together = engine.generate(texts, GREEDY)
        limits = BatchLimits(max_num_batched_tokens=PIECE + 4, max_prefill_tokens=PIECE)
        monkeypatch.setattr(engine, "_scheduler", Scheduler(limits))
        in_pieces = engine.generate(texts, GREEDY)
    for results in (together, in_pieces):
        assert [one.token_ids for one in results] == [one.token_ids for one in alone]
    for found, expected in zip(beside, logprobs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dense_format", ["int8", "int4"])
def test_native_way_takes_quantised_dense_weights(
    models: Any, dense_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.checkpoint("deepseek", dtype="fp32")
    with Engine.from_pretrained(
        folder, dense_format=dense_format, expert_memory="all", prefetch="off"
    ) as engine:
        assert engine._runner._decoder is not None
        tokens, found = decoded(engine, monkeypatch, is_native=True)
        expected, truth = decoded(engine, monkeypatch, is_native=False)
    assert tokens == expected
    assert ((found - truth).norm(dim=1) / truth.norm(dim=1)).max() < 1e-4


def test_keys_and_values_outgrow_their_first_buffer_and_the_first_rotary_table(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_decoder, "_TABLE_ROWS", 3)
    monkeypatch.setattr("outrider.runtime.models.attention._GROWTH_TOKENS", 4)
    with models.engine("qwen3_moe") as engine:
        tokens, _ = decoded(engine, monkeypatch, is_native=True)
        expected, _ = decoded(engine, monkeypatch, is_native=False)
    assert tokens == expected


def test_shared_experts_run_while_routed_ones_are_read(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def told_of(owner: Any, method: str, what: str) -> None:
        honest = getattr(owner, method)

        def call(*arguments: Any) -> Any:
            told.append(what)
            return honest(*arguments)

        monkeypatch.setattr(owner, method, call)

    told_of(GatedMlp, "__call__", "mlp")
    told_of(RmsNorm, "__call__", "norm")
    told_of(Acquisition, "_wait", "wait")
    with models.engine("deepseek", num_slots=1, prefetch="off") as engine:
        told_of(engine._runner._decoder._token_pass, "_call", "pass")
        engine.generate([prompt_of(7)], SamplingParams(max_tokens=2, temperature=0.0))
    # One dense layer, then two of experts, top 3 of them in one slot: at least two waits each. The
    # prompt's pass comes first. The other begins its reads, computes what needs none of them, then
    # an expert at a time.
    prompt = "norm mlp (norm mlp (wait ){2,}){2}norm"
    token = " pass( pass( wait pass){2,3}){2}"
    assert re.fullmatch(prompt + token, " ".join(told)), told


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - FAMILIES))
def test_other_families_keep_the_models_own_way(models: Any, family: str) -> None:
    assert NativeDecoder.of(models.loaded(family).model) is None


@pytest.mark.parametrize(
    "family, field, value",
    [("qwen3_moe", "sliding_window", 8), ("olmoe", "clip_qkv", 1.0)],
)
def test_what_the_calls_do_not_compute_keeps_the_models_own_way(
    models: Any, family: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.loaded(family)
    monkeypatch.setattr(loaded.model.config, field, value)
    assert NativeDecoder.of(loaded.model) is None


@pytest.mark.parametrize("where", ["_norm", "_head"])
def test_a_pass_that_fails_at_its_end_has_added_nothing_to_the_past(
    models: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left (a test says so)")

    with models.engine("olmoe", dtype="fp32") as engine:
        decoder, kv = engine._runner._decoder, SequenceKv()
        spans = [Span(kv, 0, 3)]
        calls = {"num_streamed": 0, "rows": [2]}
        engine._runner._executor.begin_step(0, [])
        honest = decoder.logits([5, 6, 7], [0, 1, 2], [Span(SequenceKv(), 0, 3)], **calls)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, where, fail)
            with pytest.raises(RuntimeError, match="a test says so"):
                decoder.logits([5, 6, 7], [0, 1, 2], spans, **calls)
        assert kv.length == 0
        assert torch.equal(decoder.logits([5, 6, 7], [0, 1, 2], spans, **calls), honest)
        assert kv.length == 3
        engine._runner._executor.end_step()
