"""One layer of experts against a plain sum, and predictors that misbehave in every way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.kernels.weights import ExpertWeights
from outrider.predictors.base import Forecast
from outrider.runtime.errors import TransferError
from outrider.runtime.executor import ExpertExecutor
from outrider.runtime.experts.arithmetic import KernelArithmetic
from outrider.runtime.experts.cache import ExpertCache
from outrider.runtime.experts.eviction import make_eviction
from outrider.runtime.experts.prefetcher import Prefetcher
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.observers import Observer
from outrider.runtime.testing import ManualTransfer, write_experts

SHAPE = ModelShape(
    num_moe_layers=3, num_experts=6, top_k=2, hidden_size=16, expert_size=8, fingerprint=""
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("experts"), SHAPE)


class Poisoned(ManualTransfer):
    """Fills a slot with NaN before it is loaded; what is read ahead is there at once."""

    def submit(self, key, slot, kind):
        self._arena.poison(slot)
        copy = super().submit(key, slot, kind)
        if kind.name == "PREFETCH":
            self.complete(copy)
        return copy


def executor_of(source, num_slots, *, mode="on", transfers=Poisoned):
    arena = SlotArena(num_slots, source.views, source.nbytes)
    for slot in range(num_slots):
        arena.poison(slot)
    engine = transfers(source, arena)
    cache = ExpertCache(
        num_slots,
        eviction=make_eviction("layer-lfu", shape=SHAPE, num_slots=num_slots),
        prefetch_limit=min(2, num_slots - 1),
    )
    weights = ExpertWeights(
        {name: arena.stacked(name) for name in source.views}, SHAPE.hidden_size, fmt="fp32"
    )
    return ExpertExecutor(
        shape=SHAPE,
        cache=cache,
        transfers=engine,
        prefetcher=Prefetcher(cache, engine, shape=SHAPE, nbytes=source.nbytes, mode=mode),
        arithmetic=KernelArithmetic(weights, impl="reference"),
        block_bytes=source.nbytes,
    )


def plain_sum(source, layer_idx, hidden_states, ids, weights):
    """sum_k w_k * down(silu(gate x) * up x), in float64, one token and expert at a time."""
    result = torch.zeros_like(hidden_states, dtype=torch.float64)
    for token in range(len(ids)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            tensors = source.reference(ExpertKey(layer_idx, expert))
            gate, up = (tensors["gate_up_proj"].double() @ hidden_states[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            result[token] += weight * (tensors["down_proj"].double() @ inner)
    return result


def step_of(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer_idx in range(SHAPE.num_moe_layers):
        states = torch.randn(num_tokens, SHAPE.hidden_size, generator=generator)
        scores = torch.rand(num_tokens, SHAPE.num_experts, generator=generator)
        ids = scores.argsort(dim=1)[:, : SHAPE.top_k]  # in no order that the kernels may lean on
        yield layer_idx, states, ids, torch.rand(num_tokens, SHAPE.top_k, generator=generator)


def run_steps(executor, sizes, *, predictor=None):
    """Passes of these many tokens; the outputs of all layers, and the traffic."""
    outputs, traffic = [], None
    for step, num_tokens in enumerate(sizes):
        observers = []
        if predictor is not None:
            token_id = None if step == 0 else 7
            observers = [Observer(predictor, 0, num_tokens, step, token_id)]
        executor.begin_step(step, observers)
        for layer_idx, states, ids, weights in step_of(num_tokens, step):
            outputs.append(executor.forward(layer_idx, None, states, ids, weights))
        one, _ = executor.end_step()
        one.check()
        traffic = one if traffic is None else traffic + one
    executor.cache.check()
    return outputs, traffic


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), num_slots=st.sampled_from([1, 2, 5])
)
def test_a_layer_is_the_plain_weighted_sum_of_its_experts(source, sizes, num_slots):
    outputs, traffic = run_steps(executor_of(source, num_slots), sizes)
    expected = [
        plain_sum(source, layer_idx, states, ids, weights)
        for step, num_tokens in enumerate(sizes)
        for layer_idx, states, ids, weights in step_of(num_tokens, step)
    ]
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    needed = sum(
        len(ids.unique())
        for step, num_tokens in enumerate(sizes)
        for _, _, ids, _ in step_of(num_tokens, step)
    )
    assert traffic.lookups == needed


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 18])
def test_the_number_of_slots_changes_no_bit(source, num_slots):
    sizes = [5, 1, 1, 3, 1]
    expected, _ = run_steps(executor_of(source, 18, mode="off"), sizes)
    got, _ = run_steps(executor_of(source, num_slots), sizes)
    assert all(map(torch.equal, got, expected))


class Honest:
    """Answers as a predictor should; `calls` counts them, those in the pass apart as `asked`. The
    misbehaving ones below override.
    """

    shape = SHAPE

    def __init__(self):
        self.calls = self.asked = 0
        self.step = 0

    def begin(self, prompt_ids):
        pass

    def forecast(self, **changes):
        probability = np.full((SHAPE.num_moe_layers, SHAPE.num_experts), 0.9, dtype=np.float32)
        fields = {"step": self.step, "layer_from": 0, "layer_to": 3, "probability": probability}
        return Forecast(**(fields | changes))

    def before_token(self, token_id, horizon):
        self.calls += 1
        self.step += horizon == 1
        return self.forecast() if horizon == 1 else None

    def in_pass(self, layer_idx, router_input):
        self.asked += 1

    def observe(self, layer_idx, topk_ids, topk_weights, router_input):
        self.calls += 1


def raising(method, error):
    def misbehave(self, *arguments):
        self.calls += 1
        raise error

    return type(f"Raises{method}", (Honest,), {method: misbehave})


def answering(**changes):
    def before_token(self, token_id, horizon):
        self.calls += 1
        return self.forecast(**changes)

    return type("Answers", (Honest,), {"before_token": before_token})


def answers(value):
    def before_token(self, token_id, horizon):
        self.calls += 1
        return value

    return type("Returns", (Honest,), {"before_token": before_token})


def full(value, *, shape=(3, 6), dtype=np.float32):
    return np.full(shape, value, dtype=dtype)


MISBEHAVING = [
    pytest.param(raising("before_token", RuntimeError("no")), id="raises-before-token"),
    pytest.param(raising("in_pass", ZeroDivisionError()), id="raises-in-pass"),
    pytest.param(raising("observe", KeyError("x")), id="raises-in-observe"),
    pytest.param(raising("in_pass", MemoryError()), id="runs-out-of-memory"),
    pytest.param(raising("in_pass", RecursionError()), id="recurses"),
    pytest.param(answering(probability=full(np.nan)), id="nan"),
    pytest.param(answering(probability=full(np.inf)), id="inf"),
    pytest.param(answering(probability=full(-0.1)), id="negative"),
    pytest.param(answering(probability=full(1.5)), id="above-one"),
    pytest.param(answering(probability=full(0.5, shape=(3, 5))), id="too-few-experts"),
    pytest.param(answering(probability=full(0.5, shape=(2, 6))), id="too-few-layers"),
    pytest.param(answering(probability=full(0.5, shape=(18,))), id="flat"),
    pytest.param(answering(probability=full(0.5, dtype=np.float64)), id="float64"),
    pytest.param(answering(probability=full(1, dtype=object)), id="objects"),
    pytest.param(answering(probability=[[0.5] * 6] * 3), id="a-list"),
    pytest.param(answering(probability=None), id="no-probability"),
    pytest.param(answering(layer_from=-1), id="layer-below-0"),
    pytest.param(answering(layer_to=4), id="layer-past-the-last"),
    pytest.param(answering(layer_from=2, layer_to=2), id="no-layer"),
    pytest.param(answering(layer_from=0.5), id="half-a-layer"),
    pytest.param(answering(step=None), id="step-none"),
    pytest.param(answering(step="1"), id="step-text"),
    pytest.param(answering(step=float("nan")), id="step-nan"),
    pytest.param(answers("everything"), id="text"),
    pytest.param(answers(42), id="a-number"),
]


@pytest.mark.parametrize("kind", MISBEHAVING)
def test_a_predictor_that_misbehaves_is_switched_off_and_changes_no_bit(source, kind, caplog):
    sizes = [4, 1, 1, 1]
    expected, _ = run_steps(executor_of(source, 5, mode="off"), sizes)
    executor = executor_of(source, 5)
    predictor = kind()
    got, _ = run_steps(executor, sizes, predictor=predictor)
    assert all(map(torch.equal, got, expected))
    assert executor.is_degraded
    assert "is switched off" in caplog.text
    calls = predictor.calls
    run_steps(executor, [1, 1], predictor=predictor)
    assert predictor.calls == calls, "it was asked again"


def test_an_honest_predictor_stays_on(source):
    executor = executor_of(source, 5)
    predictor = Honest()
    _, traffic = run_steps(executor, [4, 1, 1], predictor=predictor)
    assert not executor.is_degraded
    assert traffic.prefetch_issued > 0
    # observe of 3 layers in 3 passes, before_token of both horizons in 2 passes; in_pass where
    # nothing is known of the next layer, and where a read was still awaited.
    assert predictor.calls == 3 * 3 + 2 * 2
    assert 2 <= predictor.asked <= 2 * 3


def test_one_sequences_predictor_failing_leaves_the_others_alone(source):
    executor = executor_of(source, 5)
    bad, good = raising("in_pass", RuntimeError("no"))(), Honest()
    for step in range(3):
        token_id = None if step == 0 else 3
        executor.begin_step(
            step, [Observer(bad, 0, 1, step, token_id), Observer(good, 1, 2, step, token_id)]
        )
        for layer_idx, states, ids, weights in step_of(2, step):
            executor.forward(layer_idx, None, states, ids, weights)
        executor.end_step()
    assert bad.calls == 1
    assert good.calls == 3 * 3 + 2 * 2
    assert 2 <= good.asked <= 2 * 3


def test_each_predictor_sees_its_own_rows(source):
    seen = []

    class Watching(Honest):
        def in_pass(self, layer_idx, router_input):
            seen.append(("in", router_input.clone()))

        def observe(self, layer_idx, topk_ids, topk_weights, router_input):
            seen.append(("ids", topk_ids.copy(), topk_weights.copy(), router_input.clone()))

    executor = executor_of(source, 5)
    executor.begin_step(0, [Observer(Watching(), 1, 3, 0, None)])
    _, states, ids, weights = next(step_of(4, 0))
    executor.forward(0, None, states, ids, weights)
    assert torch.equal(seen[0][1], states[1:3])
    assert np.array_equal(seen[1][1], ids[1:3].numpy())
    assert np.allclose(seen[1][2], weights[1:3].numpy())
    assert torch.equal(seen[1][3], states[1:3])


def test_a_forecast_counts_in_the_sequences_own_steps(source):
    # The sequence is in its pass 1 while the engine is in pass 40: the prefetch is for now.
    executor = executor_of(source, 5)
    executor.begin_step(40, [Observer(Honest(), 0, 1, 1, 9)])
    _, _, ids, weights = next(step_of(1, 0))
    executor.forward(0, None, torch.randn(1, 16), ids, weights)
    traffic, _ = executor.end_step()
    assert traffic.prefetch_issued > 0


def test_a_read_that_fails_is_an_error_and_the_next_step_runs(source):
    class Failing(Poisoned):
        is_broken = True

        def submit(self, key, slot, kind):
            copy = super().submit(key, slot, kind)
            if self.is_broken and not copy.done():
                self.fail(copy, "the disk is gone")
            return copy

    executor = executor_of(source, 2, mode="off", transfers=Failing)
    executor.begin_step(0, [])
    layer_idx, states, ids, weights = next(step_of(3, 0))
    with pytest.raises(TransferError, match="the disk is gone"):
        executor.forward(layer_idx, None, states, ids, weights)
    executor.cache.check()
    executor._transfers.is_broken = False
    got, _ = run_steps(executor, [3])
    expected, _ = run_steps(executor_of(source, 18, mode="off"), [3])
    assert all(map(torch.equal, got, expected))


def test_a_stall_is_time_spent_waiting_and_bytes_are_what_was_read(source):
    executor = executor_of(source, 18, mode="off")
    _, cold = run_steps(executor, [2])
    _, warm = run_steps(executor, [2])
    assert cold.bytes_on_demand == cold.misses * source.layout(ExpertKey(0, 0)).bytes_read
    assert (warm.misses, warm.bytes_on_demand) == (0, 0)
    assert warm.hits_resident == warm.lookups == cold.misses
