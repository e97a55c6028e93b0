"""Decoded tokens that go through all layers in one native call, against the way layer by layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engines import WrongPredictor, prompt_of

from outrider.kernels import native
from outrider.kernels.router import Router
from outrider.runtime.engine import Engine
from outrider.runtime.executor import ExpertExecutor
from outrider.runtime.models.llama_form import FAMILIES
from outrider.runtime.models.loading import LoadedModel
from outrider.runtime.request import SamplingParams
from outrider.runtime.runner import ModelRunner

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built")

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
TEXTS = [prompt_of(7), prompt_of(3), prompt_of(12)]


class Run:
    """What an engine made of one text and then of three side by side."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, *, is_whole: bool) -> None:
        self.logits: list[torch.Tensor] = []
        self.num_layers = 0
        honest, forward = ModelRunner.run, ExpertExecutor.forward

        def run(runner: ModelRunner, *arguments: Any, **named: Any) -> Any:
            output = honest(runner, *arguments, **named)
            self.logits.append(output.logits)
            return output

        def counted(executor: ExpertExecutor, *arguments: Any) -> torch.Tensor:
            self.num_layers += 1
            return forward(executor, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "run", run)
            patch.setattr(ExpertExecutor, "forward", counted)
            if not is_whole:
                patch.setattr(ExpertExecutor, "table", lambda _: None)
            engine._runner = ModelRunner(engine.loaded, engine.tier.executor)
            results = engine.generate(TEXTS[:1], GREEDY) + engine.generate(TEXTS, GREEDY)
        cache = engine.tier.executor.cache
        cache.check()
        self.token_ids = [one.token_ids for one in results]
        self.traffic = [one.stats.experts.decode.as_dict() for one in results]
        self.kept = (cache.resident().keys(), cache.counters)


@pytest.mark.parametrize(
    "num_slots", [None, 24, 5], ids=["all-in-slots", "most", "never-a-whole-layer"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_call_gives_the_bits_and_counts_of_a_call_a_layer(
    models: Any, family: str, dtype: str, num_slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for is_whole in (True, False):
        with models.engine(family, dtype=dtype, num_slots=num_slots, prefetch="off") as engine:
            runs.append(Run(engine, monkeypatch, is_whole=is_whole))
    whole, apart = runs
    assert whole.token_ids == apart.token_ids
    assert len(whole.logits) == len(apart.logits)
    assert all(torch.equal(*pair) for pair in zip(whole.logits, apart.logits, strict=True))
    assert whole.num_layers <= apart.num_layers
    for mine, its in zip(whole.traffic, apart.traffic, strict=True):
        assert mine["lookups"] == its["lookups"]
    if num_slots is None:  # else what is evicted depends on which read ends first
        assert whole.traffic == apart.traffic
        assert whole.kept == apart.kept
        assert whole.num_layers < apart.num_layers


@dataclass(slots=True)
class Shown:
    """What a predictor was shown of one layer of a pass."""

    layer_idx: int
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    router_input: torch.Tensor


class Watcher(WrongPredictor):
    """Forecasts at random; keeps what it is shown without a copy, as a predictor may."""

    def __init__(self, loaded: LoadedModel, shown: list[Shown]) -> None:
        super().__init__(loaded)
        self._shown = shown

    def observe(self, layer_idx: int, topk_ids: Any, topk_weights: Any, router_input: Any) -> None:
        self._shown.append(Shown(layer_idx, topk_ids, topk_weights, router_input))


@pytest.mark.parametrize("num_slots", [14, 5], ids=["many", "never-a-whole-layer"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_predictors_are_shown_the_same_either_way(
    models: Any, family: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, shown = [], ([], [])
    for is_whole, seen in zip((True, False), shown, strict=True):
        with models.engine(
            family,
            dtype="bf16",
            num_slots=num_slots,
            prefetch="on",
            make_predictor=lambda loaded, seen=seen: Watcher(loaded, seen),
        ) as engine:
            runs.append(Run(engine, monkeypatch, is_whole=is_whole))
    assert all(torch.equal(*pair) for pair in zip(runs[0].logits, runs[1].logits, strict=True))
    assert runs[0].num_layers < runs[1].num_layers
    for mine, its in zip(*shown, strict=True):
        assert mine.layer_idx == its.layer_idx
        assert np.array_equal(mine.topk_ids, its.topk_ids)
        assert np.array_equal(mine.topk_weights, its.topk_weights)
        assert torch.equal(mine.router_input, its.router_input)


@pytest.mark.parametrize("family", ["deepseek", "qwen2_moe"])
def test_ties_are_settled_as_layer_by_layer(
    models: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts whose routers' rows are equal tie in every choice that does not hold them all."""
    settled = 0
    honest = Router.settle

    def settle(router: Router, scores: Any, is_tied: Any, ids: Any) -> None:
        nonlocal settled
        settled += int(is_tied.sum())
        honest(router, scores, is_tied, ids)

    monkeypatch.setattr(Router, "settle", settle)
    loaded = models.loaded(family, dtype="bf16")
    weights = [layer.router.weight for layer in loaded.layers]
    kept = [weight.detach().clone() for weight in weights]
    runs = []
    try:
        for weight in weights:
            weight.data[:] = weight.data[:1]
        for is_whole in (True, False):
            with models.engine(family, dtype="bf16", prefetch="off") as engine:
                runs.append(Run(engine, monkeypatch, is_whole=is_whole))
                counted, settled = settled, 0
                assert counted > 0
    finally:
        for weight, original in zip(weights, kept, strict=True):
            weight.data[:] = original
    assert runs[0].token_ids == runs[1].token_ids
    assert all(torch.equal(*pair) for pair in zip(runs[0].logits, runs[1].logits, strict=True))


def test_whoever_stands_before_the_experts_function_sees_every_layer(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    with models.engine("olmoe", prefetch="off") as engine:
        (expected,) = engine.generate(TEXTS[:1], GREEDY)
        forward = engine.tier.executor.forward
        for layer in engine.loaded.layers:
            monkeypatch.setattr(
                layer.experts,
                "outrider_function",
                lambda *call: seen.append(call[0]) or forward(*call),
            )
        (found,) = engine.generate(TEXTS[:1], GREEDY)
        num_layers = len(engine.loaded.layers)
    assert found.token_ids == expected.token_ids
    assert seen == list(range(num_layers)) * GREEDY.max_tokens
