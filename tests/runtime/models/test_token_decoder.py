"""A single token's short way through the decoder against the model's own modules."""

import re
from typing import Any

import pytest
import torch
from engines import prompt_of
from families import FAMILIES as ALL_FAMILIES

from outrider.kernels import native
from outrider.kernels.token import RmsNorm, TokenMlp
from outrider.runtime.acquisition import Acquisition
from outrider.runtime.engine import Engine
from outrider.runtime.models import token_decoder
from outrider.runtime.models.token_decoder import FAMILIES, TokenDecoder
from outrider.runtime.request import SamplingParams
from outrider.runtime.runner import ModelRunner

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
# Relative error of a row of logits; in bf16 a near-tie may tip to another expert, so the median.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.04, "fp16": 0.01}


def decoded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, *, is_short: bool
) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens of a text, and the logits behind each, by the short way or by the model's."""
    runner, logits = engine._runner, []
    honest = ModelRunner.run

    def run(self: ModelRunner, *arguments: Any, **named: Any) -> Any:
        output = honest(self, *arguments, **named)
        logits.append(output.logits)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", run)
        if not is_short:
            patch.setattr(runner, "_decoder", None)
        (result,) = engine.generate([prompt_of(7)], GREEDY)
    return result.token_ids, logits


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_short_way_computes_what_the_model_does(
    models: Any, family: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models.engine(family, dtype=dtype) as engine:
        assert engine._runner._decoder is not None
        tokens, logits = decoded(engine, monkeypatch, is_short=True)
        expected, truths = decoded(engine, monkeypatch, is_short=False)
    errors = []
    for place, (found, truth) in enumerate(zip(logits, truths, strict=True)):
        if tokens[:place] == expected[:place]:
            errors.append(float((found - truth).norm() / truth.norm()))
    behind_decoded = sorted(errors[1:])  # in bf16 a near-tie may soon end what can be compared
    assert len(behind_decoded) > 2
    assert behind_decoded[len(behind_decoded) // 2] < TOLERANCE[dtype]
    if dtype == "fp32":
        assert tokens == expected and max(errors) < TOLERANCE[dtype]
        assert errors[0] == 0.0, "the prompt itself goes through the model"


def test_short_way_is_taken_for_single_tokens_and_for_nothing_else(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    honest = TokenDecoder.logits

    def logits(self: TokenDecoder, token_id: int, position: int, kv: Any) -> torch.Tensor:
        taken.append(position)
        return honest(self, token_id, position, kv)

    monkeypatch.setattr(TokenDecoder, "logits", logits)
    with models.engine("deepseek") as engine:
        engine.generate([prompt_of(7)], SamplingParams(max_tokens=4, temperature=0.0))
        assert taken == [7, 8, 9]
        engine.generate([prompt_of(7), prompt_of(5)], SamplingParams(max_tokens=4, temperature=0.0))
        assert taken == [7, 8, 9]


@pytest.mark.parametrize("dense_format", ["int8", "int4"])
def test_short_way_takes_quantised_dense_weights(
    models: Any, dense_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.checkpoint("deepseek", dtype="fp32")
    with Engine.from_pretrained(
        folder, dense_format=dense_format, expert_memory="all", prefetch="off"
    ) as engine:
        assert engine._runner._decoder is not None
        tokens, logits = decoded(engine, monkeypatch, is_short=True)
        expected, truths = decoded(engine, monkeypatch, is_short=False)
    assert tokens == expected
    for found, truth in zip(logits, truths, strict=True):
        assert float((found - truth).norm() / truth.norm()) < 1e-4


def test_keys_and_values_outgrow_their_first_buffer_and_the_first_rotary_table(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_decoder, "_TABLE_ROWS", 3)
    monkeypatch.setattr("outrider.runtime.models.attention._GROWTH_TOKENS", 4)
    with models.engine("qwen3_moe") as engine:
        tokens, _ = decoded(engine, monkeypatch, is_short=True)
        expected, _ = decoded(engine, monkeypatch, is_short=False)
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

    told_of(TokenMlp, "__call__", "mlp")
    told_of(RmsNorm, "__call__", "norm")
    told_of(Acquisition, "_wait", "wait")
    with models.engine("deepseek", num_slots=1, prefetch="off") as engine:
        engine.generate([prompt_of(7)], SamplingParams(max_tokens=2, temperature=0.0))
    decoded = " ".join(told[told.index("norm") :])
    # One dense layer, then two of experts, top 3 of them in one slot: at least two waits each.
    assert re.fullmatch("norm mlp (norm mlp (wait ){2,3}){2}norm", decoded), decoded


@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - FAMILIES))
def test_other_families_keep_the_models_own_way(models: Any, family: str) -> None:
    assert TokenDecoder.of(models.loaded(family).model) is None


@pytest.mark.parametrize(
    "family, field, value",
    [("qwen3_moe", "sliding_window", 8), ("olmoe", "clip_qkv", 1.0)],
)
def test_what_the_calls_do_not_compute_keeps_the_models_own_way(
    models: Any, family: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.loaded(family)
    monkeypatch.setattr(loaded.model.config, field, value)
    assert TokenDecoder.of(loaded.model) is None
