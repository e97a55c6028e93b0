"""What an engine leaves behind: nothing, however it ends."""

import gc
import weakref
from typing import Any

import pytest
import torch

from outrider.runtime import Engine, SamplingParams
from outrider.runtime.errors import InsufficientMemoryError
from outrider.runtime.models.dense import stack_weights
from outrider.runtime.runner import ModelRunner

PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def test_a_closed_engine_holds_no_expert_memory(models: Any) -> None:
    folder = models.checkpoint("deepseek")
    with Engine.from_pretrained(folder, expert_memory="50%", prefetch="off") as engine:
        engine.generate([[1, 2, 3]], PARAMS)
        memory = weakref.ref(engine.tier.arena._memory)
        assert memory() is not None
    gc.collect()
    assert memory() is None, "the engine is still held, its slots are not"
    assert engine.loaded is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), RuntimeError("made up")])
def test_a_runner_that_cannot_be_made_leaves_no_tier(
    models: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tiers: list[Any] = []
    honest = ModelRunner.__init__

    def failing(self: ModelRunner, loaded: Any, executor: Any, **options: Any) -> None:
        tiers.append(executor)
        honest(self, loaded, executor, **options)
        with self._translated("made up"):
            raise error

    monkeypatch.setattr(ModelRunner, "__init__", failing)
    expected = RuntimeError if type(error) is RuntimeError else InsufficientMemoryError
    with pytest.raises(expected, match="made up"):
        Engine.from_pretrained(models.checkpoint("deepseek"), expert_memory="50%", prefetch="off")
    (executor,) = tiers
    assert executor.arithmetic.native_weights is None, "the tier was not closed"


def test_weights_that_lie_one_below_the_other_are_not_copied_again() -> None:
    layers = [torch.nn.Linear(8, rows, bias=False) for rows in (3, 5, 2)]
    truth = torch.cat([layer.weight.detach() for layer in layers])
    for layer in layers:
        layer.weight.requires_grad_(False)
    first, second = stack_weights(layers), stack_weights(layers)
    assert first is not None and second is not None
    assert torch.equal(first[0]["weight"], truth) and torch.equal(second[0]["weight"], truth)
    assert second[0]["weight"].data_ptr() == first[0]["weight"].data_ptr()
    assert layers[1].weight.data_ptr() == first[0]["weight"][3:].data_ptr()
    # Of others, in another order, it is a copy.
    moved = stack_weights([layers[1], layers[0]])
    assert moved is not None
    assert torch.equal(moved[0]["weight"], torch.cat([truth[3:8], truth[:3]]))
