"""A device's own decoder against the model's modules, over budgets; interpreted or on a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engines
import pytest
import torch
from engines import prompt_of
from triton_device import IS_INTERPRETED

from outrider.kernels import decode_attention
from outrider.runtime.engine import Engine
from outrider.runtime.experts.arithmetic import KernelArithmetic
from outrider.runtime.models import device_decoder
from outrider.runtime.models.device_decoder import DeviceDecoder
from outrider.runtime.models.llama_form import FAMILIES
from outrider.runtime.request import SamplingParams

GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
TEXTS = [prompt_of(7), prompt_of(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> engines.Models:
    return engines.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    # A program is Python in the interpreter, and most splits of a short text are empty.
    if IS_INTERPRETED:
        monkeypatch.setattr(decode_attention, "NUM_SPLITS", 2)


class AtOnce:
    """A queue for the CPU: what is queued is done."""

    def __init__(self) -> None:
        self.num_waits = 0

    def recorded(self, work: Any) -> Any:
        return work

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def mark(self) -> None:
        pass

    def wait(self) -> None:
        self.num_waits += 1


@contextmanager
def engine_of(models: engines.Models, family: str, **options: Any) -> Iterator[Engine]:
    """An engine that decodes by the device's decoder."""
    folder = models.checkpoint(family, dtype=options.pop("dtype", "fp32"))
    device = "cpu" if IS_INTERPRETED else "cuda"
    with Engine.from_pretrained(folder, device=device, **options) as engine:
        if IS_INTERPRETED:
            executor, runner = engine.tier.executor, engine._runner
            weights = executor.arithmetic._weights  # type: ignore[attr-defined]
            executor.arithmetic = KernelArithmetic(weights, impl="triton")
            runner._decoder = None
            runner._device_decoder = DeviceDecoder.of(engine.loaded.model, AtOnce())
        assert engine._runner._device_decoder is not None
        yield engine


def generated(engine: Engine, texts: list[Any] = TEXTS) -> list[list[int]]:
    return [list(engine.generate([text], GREEDY)[0].token_ids) for text in texts]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_those_of_the_models_own_modules(
    models: engines.Models, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(models, family, expert_memory="all", prefetch="off") as engine:
        passes = []
        honest = DeviceDecoder.decode

        def counted(self: DeviceDecoder, *arguments: Any, **named: Any) -> torch.Tensor:
            passes.append(honest(self, *arguments, **named).clone())
            return passes[-1]

        monkeypatch.setattr(DeviceDecoder, "decode", counted)
        found = generated(engine, TEXTS[:1])
        assert len(passes) == GREEDY.max_tokens - 1
        logits = [one.cpu() for one in passes]
        engine._runner._device_decoder = None
        truth: list[torch.Tensor] = []
        forward = engine._runner._forward
        monkeypatch.setattr(
            engine._runner,
            "_forward",
            lambda *given: truth.append(forward(*given)) or truth[-1],
        )
        assert generated(engine, TEXTS[:1]) == found
    # The first pass is the prompt's.
    for mine, theirs in zip(logits, truth[1:], strict=True):
        assert float((mine - theirs.cpu()).norm() / theirs.cpu().norm()) < 1e-5


@pytest.mark.parametrize("family", ["deepseek"] if IS_INTERPRETED else sorted(FAMILIES))
def test_tokens_are_the_same_with_any_budget_and_prefetching(
    models: engines.Models, family: str
) -> None:
    with engine_of(models, family, expert_memory="all", prefetch="off") as engine:
        expected = generated(engine)
    for budget, prefetch in (("50%", "on"), ("30%", "off")):
        with engine_of(
            models, family, expert_memory=budget, prefetch=prefetch, predictor="frequent"
        ) as engine:
            assert generated(engine) == expected, (budget, prefetch)
            engine.tier.executor.cache.check()
            assert not engine.tier.executor._holds_all


@pytest.mark.parametrize("budget", ["50%"] if IS_INTERPRETED else ["all", "50%"])
def test_a_text_gets_the_same_tokens_alone_and_in_company(
    models: engines.Models, budget: str
) -> None:
    with engine_of(models, "qwen3_moe", expert_memory=budget, prefetch="off") as engine:
        alone = generated(engine)
        together = engine.generate(TEXTS, GREEDY)
    assert [list(one.token_ids) for one in together] == alone


@pytest.mark.parametrize("dense_format", ["int8"] if IS_INTERPRETED else ["int8", "int4"])
def test_dense_weights_may_be_quantised(models: engines.Models, dense_format: str) -> None:
    options = {"expert_memory": "all", "prefetch": "off", "dense_format": dense_format}
    with engine_of(models, "deepseek", **options) as engine:
        found = generated(engine, TEXTS[:1])
        engine._runner._device_decoder = None
        assert generated(engine, TEXTS[:1]) == found


def test_texts_outgrow_the_first_keys_and_the_first_rotary_table(
    models: engines.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_decoder, "_TABLE_ROWS", 4)
    monkeypatch.setattr(device_decoder, "_MAX_FIRST_ROWS", 4)
    monkeypatch.setattr("outrider.runtime.models.attention._GROWTH_TOKENS", 4)
    with engine_of(models, "mixtral", expert_memory="all", prefetch="off") as engine:
        found = generated(engine, TEXTS[:1])
        engine._runner._device_decoder = None
        assert generated(engine, TEXTS[:1]) == found


def test_what_is_recorded_ahead_changes_no_token(models: engines.Models) -> None:
    with engine_of(models, "olmoe", expert_memory="all", prefetch="off") as engine:
        expected = generated(engine, TEXTS[:1])
        decoder = engine._runner._device_decoder
        weights = engine.tier.executor.device_weights
        assert decoder is not None and weights is not None
        decoder._passes.clear()
        decoder.prepare(weights)
        assert list(decoder._passes) == [1]
        assert generated(engine, TEXTS[:1]) == expected


def test_where_nothing_can_be_missing_the_host_waits_once_a_token(
    models: engines.Models,
) -> None:
    if not IS_INTERPRETED:
        pytest.skip("counts the waits of a queue of its own")
    with engine_of(models, "deepseek", expert_memory="all", prefetch="off") as engine:
        generated(engine)
        queue: Any = engine._runner._device_decoder._queue  # type: ignore[union-attr]
        generated(engine)
        before = queue.num_waits
        generated(engine)
        assert queue.num_waits - before == len(TEXTS) * (GREEDY.max_tokens - 1)
