"""Native forecasts against the same mathematics in numpy, on every instruction set."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outrider.collect.schema import ModelShape
from outrider.kernels import forecast, native
from outrider.predictors.counts import CountTable
from outrider.predictors.drift import NUM_GELU, NUM_LINEAR, Stage, num_features
from outrider.predictors.ensemble import Ensemble
from outrider.predictors.hierarchical import Hierarchical
from outrider.predictors.in_pass import DEPTH, later_layers
from outrider.predictors.presets import Settings
from outrider.predictors.statistics import Statistics, Transitions

pytestmark = pytest.mark.skipif(not forecast.is_available(), reason="no native library was built")

SHAPE = ModelShape(
    num_moe_layers=6, num_experts=24, top_k=3, hidden_size=40, expert_size=8, fingerprint=""
)
KNOWN = np.array([2, 3, 5, 8, 13, 21])


@pytest.fixture(params=native.ISAS)
def isa(request) -> Iterator[str]:
    before = native.isa()
    if not native.use_isa(request.param):
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    native.use_isa(before)


def make_statistics(rng: np.random.Generator) -> Statistics:
    layers, experts = SHAPE.num_moe_layers, SHAPE.num_experts
    tables = [
        CountTable(
            KNOWN,
            rng.integers(1, 400, len(KNOWN)).astype(np.float32),
            np.array([1, 1, 2.5, 1, 1, 1.5], np.float32),
            rng.integers(0, 5, (len(KNOWN), layers * experts)).astype(np.uint8),
        )
        for _ in range(2)
    ]
    chances = rng.dirichlet(np.full(experts, 0.3), (2, layers, experts)) * SHAPE.top_k
    return Statistics(
        SHAPE,
        frequencies=np.full((layers, experts), SHAPE.top_k / experts, np.float32),
        tables=tables,
        transitions=[Transitions(np.minimum(one, 1.0).astype(np.float32)) for one in chances],
        strengths=[1.0, 8.0],
    )


def make_before(seed: int, *, layers: int = 1, hidden_layers: tuple[int, ...] = (1, 4)):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    settings = Settings(width=32, heads=4, layers=layers, context=3, clusters=5)
    network = Hierarchical.build(
        SHAPE,
        settings,
        vocabulary=len(KNOWN) + 1,
        num_states=len(hidden_layers) * SHAPE.hidden_size,
        constants={"cluster": rng.integers(0, 5, (SHAPE.num_moe_layers, SHAPE.num_experts))},
    )
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    family = Hierarchical(make_statistics(rng), network, settings, hidden_layers)
    family.calibration.scale[:] = rng.uniform(0.5, 1.5, family.calibration.scale.shape)
    return family


def make_ensemble(seed: int, before: Hierarchical) -> Ensemble:
    rng = np.random.default_rng(seed)
    stages = []
    for layer_idx in range(SHAPE.num_moe_layers - 1):
        outputs = len(later_layers(SHAPE, layer_idx)) * SHAPE.num_experts
        units, features = NUM_LINEAR + NUM_GELU, num_features(SHAPE)
        parts = [
            rng.normal(0, scale, size)
            for scale, size in (
                (features**-0.5, (units, features)),
                (0.5, units),
                (units**-0.5, (outputs, units)),
                (0.5, outputs),
            )
        ]
        stages.append(Stage(*(one.astype(np.float16).astype(np.float32) for one in parts)))
    slopes = rng.uniform(0.3, 1.5, (2, DEPTH, SHAPE.num_moe_layers, 2)).astype(np.float32)
    return Ensemble(before, stages, slopes)


def make_gates(rng: np.random.Generator, *, has_bias: bool) -> list:
    size = (SHAPE.num_moe_layers, SHAPE.num_experts)
    weights = rng.normal(0, SHAPE.hidden_size**-0.5, (*size, SHAPE.hidden_size)) * 2
    biases = rng.normal(0, 0.3, size)
    return [
        (
            torch.from_numpy(weight.astype(np.float32)),
            torch.from_numpy(bias.astype(np.float32)) if has_bias else None,
        )
        for weight, bias in zip(weights, biases, strict=True)
    ]


def course(predictor, *, dtype: torch.dtype = torch.float32, steps: int = 7) -> list[np.ndarray]:
    """Every forecast of a made-up sequence; of one pass nothing is asked."""
    rng = np.random.default_rng(9)
    predictor.begin(np.array([2, 99]))
    found = []
    for step, token in enumerate([0, 3, 3, 77, 13, 5, 2][:steps]):
        rows = 2 if step == 0 else 1
        is_asked = step not in (0, 4)
        for horizon in (1, 2) if is_asked else ():
            said = predictor.before_token(token, horizon)
            assert said.step == step + horizon - 1
            found.append(said.probability)
        for layer_idx in range(SHAPE.num_moe_layers):
            state = torch.from_numpy(rng.normal(size=(rows, SHAPE.hidden_size)) * 1.5).to(dtype)
            said = predictor.in_pass(layer_idx, state) if is_asked else None
            if said is not None:
                said.check(SHAPE)
                found.append(said.probability)
            order = rng.random((rows, SHAPE.num_experts)).argsort(axis=1)
            ids = order[:, : SHAPE.top_k]
            predictor.observe(layer_idx, ids, np.full(ids.shape, 0.5, np.float32), state)
    return found


def assert_alike(found, expected, atol: float) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_pass_is_that_of_plain_arrays(isa, scoring, has_bias, dtype, monkeypatch):
    before = make_before(1)
    ensemble = make_ensemble(2, before)
    gates = make_gates(np.random.default_rng(3), has_bias=has_bias)
    found = course(ensemble.make(gates, scoring=scoring), dtype=dtype)
    monkeypatch.setattr(forecast, "is_available", lambda: False)
    plain = make_ensemble(2, make_before(1)).make(gates, scoring=scoring)
    # Plain products round their inputs to fp16, native ones do not.
    assert_alike(found, course(plain, dtype=dtype), atol=1e-2)


@pytest.mark.parametrize(
    ("layers", "hidden_layers"), [(0, (1, 4)), (1, (1, 4)), (1, ()), (2, (0,)), (3, ())]
)
def test_before_the_token_it_is_that_of_plain_arrays(isa, layers, hidden_layers, monkeypatch):
    calls = []
    real = forecast.TokenForecast.__call__
    monkeypatch.setattr(
        forecast.TokenForecast,
        "__call__",
        lambda self, *a, **k: (calls.append(a), real(self, *a, **k))[1],
    )
    found = course(make_before(4, layers=layers, hidden_layers=hidden_layers).make())
    assert len(calls) > 1, "the native call has to be the one that is tested"
    num_called = len(calls)
    monkeypatch.setattr(forecast, "is_available", lambda: False)
    plain = course(make_before(4, layers=layers, hidden_layers=hidden_layers).make())
    assert len(calls) == num_called
    assert_alike(found, plain, atol=1e-2)
    spread = np.mean([np.abs(one - plain[0]).max() for one in plain[2:] if one.shape[0] == 6])
    assert spread > 0.1, "forecasts that are all alike would agree for no reason"


def test_odds_are_those_of_the_forecast():
    predictor = make_before(5).make()
    predictor.begin(np.array([2]))
    for layer_idx in range(SHAPE.num_moe_layers):
        ids = np.array([[0, 4, 9]])
        state = torch.ones(1, SHAPE.hidden_size)
        predictor.observe(layer_idx, ids, np.ones((1, 3), np.float32), state)
    # The first is answered by plain arrays, the second by the native call.
    for token in (3, 5):
        said = predictor.before_token(token, 1)
        odds = predictor.odds_of(said)
        kept = np.clip(said.probability, 1e-4, 1 - 1e-4)
        np.testing.assert_allclose(odds, np.log(kept / (1 - kept)), atol=1e-3)
