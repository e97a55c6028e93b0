"""The predictors that need no training, and what every predictor owes its callers."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.schema import ModelShape
from outrider.predictors.base import (
    UNTRAINED,
    Forecast,
    Predictor,
    StepCount,
    predictor_class,
)
from outrider.predictors.frequent import FrequentPredictor
from outrider.predictors.lookahead import LookaheadPredictor, inclusion_probability
from outrider.predictors.random import RandomPredictor

SHAPE = ModelShape(
    num_moe_layers=3, num_experts=16, top_k=4, hidden_size=32, expert_size=8, fingerprint=""
)
PROMPT = np.arange(5)


def make_gates(seed: int = 0, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(SHAPE.num_experts, SHAPE.hidden_size, generator=generator).to(dtype),
            torch.randn(SHAPE.num_experts, generator=generator).to(dtype) if layer_idx else None,
        )
        for layer_idx in range(SHAPE.num_moe_layers)
    ]


def make(name: str) -> Predictor:
    options = (make_gates(),) if name == "lookahead" else ()
    return predictor_class(name)(SHAPE, *options)


def run_pass(predictor: Predictor, generator: np.random.Generator, num_tokens: int) -> list:
    forecasts = []
    for layer_idx in range(SHAPE.num_moe_layers):
        router_input = torch.from_numpy(
            generator.normal(size=(num_tokens, SHAPE.hidden_size)).astype(np.float32)
        )
        forecasts.append(predictor.in_pass(layer_idx, router_input))
        ids = generator.random((num_tokens, SHAPE.num_experts)).argsort(axis=1)[:, : SHAPE.top_k]
        weights = np.full(ids.shape, 0.25, np.float32)
        predictor.observe(layer_idx, ids, weights, router_input)
    return forecasts


@pytest.mark.parametrize("name", ["frequent", "lookahead", "random"])
def test_forecasts_are_well_formed_at_every_moment(name: str) -> None:
    predictor = make(name)
    generator = np.random.default_rng(0)
    for _ in range(2):
        predictor.begin(PROMPT)
        for layer_idx, forecast in enumerate(run_pass(predictor, generator, 5)):
            if forecast is not None:
                forecast.check(SHAPE)
                assert forecast.step == 0 and forecast.layer_from == layer_idx + 1
        for step in range(1, 4):
            for horizon in (1, 2):
                forecast = predictor.before_token(7, horizon)
                if forecast is not None:
                    forecast.check(SHAPE)
                    assert (forecast.layer_from, forecast.layer_to) == (0, SHAPE.num_moe_layers)
                    assert forecast.step == step + horizon - 1
                    sums = forecast.probability.sum(axis=1)
                    np.testing.assert_allclose(sums, SHAPE.top_k, rtol=4e-3)
            for forecast in run_pass(predictor, generator, 1):
                if forecast is not None:
                    forecast.check(SHAPE)
                    assert forecast.step == step
                    sums = forecast.probability.sum(axis=1)
                    np.testing.assert_allclose(sums, SHAPE.top_k, rtol=4e-3)


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_name_leads_to_a_predictor(name: str) -> None:
    found = predictor_class(name)
    for method in ("begin", "before_token", "in_pass", "observe"):
        expected = list(inspect.signature(getattr(Predictor, method)).parameters)
        assert list(inspect.signature(getattr(found, method)).parameters) == expected, method


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'clairvoyant'.*frequent.*random"):
        predictor_class("clairvoyant")


@pytest.mark.parametrize(
    ("layers", "table"),
    [
        ((0, 3), np.zeros((2, 16), np.float32)),
        ((0, 3), np.zeros((3, 15), np.float32)),
        ((0, 3), np.zeros((3, 16))),
        ((2, 2), np.zeros((0, 16), np.float32)),
        ((2, 4), np.zeros((2, 16), np.float32)),
        ((-1, 2), np.zeros((3, 16), np.float32)),
        ((0, 3), np.full((3, 16), np.nan, np.float32)),
        ((0, 3), np.full((3, 16), np.inf, np.float32)),
        ((0, 3), np.full((3, 16), -1e-3, np.float32)),
    ],
    ids=["rows", "experts", "dtype", "empty", "beyond", "below", "nan", "inf", "negative"],
)
def test_malformed_forecasts_are_refused(layers: tuple[int, int], table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="forecast"):
        Forecast(1, *layers, table).check(SHAPE)


def test_steps_count_passes_and_not_calls() -> None:
    steps = StepCount()
    steps.begin()
    assert steps.step == 0
    for expected in (1, 2):
        steps.in_pass()
        steps.in_pass()
        steps.before_token()
        steps.before_token()
        assert steps.step == expected
    steps.begin()
    assert steps.step == 0


def test_random_is_right_by_chance_only() -> None:
    predictor = RandomPredictor(SHAPE, seed=1)
    predictor.begin(PROMPT)
    target = np.arange(SHAPE.num_experts) < SHAPE.top_k
    hits = trials = 0
    for token_id in range(2000):
        forecast = predictor.before_token(token_id, 1)
        np.testing.assert_allclose(forecast.probability, SHAPE.top_k / SHAPE.num_experts, rtol=1e-3)
        best = np.argsort(-forecast.probability, axis=1)[:, : SHAPE.top_k]
        hits += target[best].sum()
        trials += best.size
    assert hits / trials == pytest.approx(SHAPE.top_k / SHAPE.num_experts, abs=0.015)


def test_random_can_claim_a_confidence_that_it_does_not_have() -> None:
    predictor = RandomPredictor(SHAPE, confidence=0.9)
    probability = predictor.before_token(0, 1).probability
    assert ((probability > 0.89).sum(axis=1) == SHAPE.top_k).all()
    np.testing.assert_allclose(probability.sum(axis=1), SHAPE.top_k, rtol=1e-5)
    with pytest.raises(ValueError, match="confidence"):
        RandomPredictor(SHAPE, confidence=0.1)


def test_random_repeats_with_its_seed() -> None:
    first, second, other = (RandomPredictor(SHAPE, seed=seed) for seed in (3, 3, 4))
    tables = [predictor.before_token(0, 1).probability for predictor in (first, second, other)]
    assert np.array_equal(tables[0], tables[1]) and not np.array_equal(tables[0], tables[2])


def test_frequent_converges_to_the_true_shares() -> None:
    generator = np.random.default_rng(0)
    utility = np.log(generator.dirichlet(np.ones(SHAPE.num_experts), SHAPE.num_moe_layers))
    predictor = FrequentPredictor(SHAPE)
    predictor.begin(PROMPT)
    counts = np.zeros((SHAPE.num_moe_layers, SHAPE.num_experts))
    num_tokens = 3000
    for layer_idx in range(SHAPE.num_moe_layers):
        noise = generator.gumbel(size=(num_tokens, SHAPE.num_experts))
        ids = np.argsort(-(utility[layer_idx] + noise), axis=1)[:, : SHAPE.top_k]
        for row in ids:
            counts[layer_idx, row] += 1
        for chunk in np.array_split(ids, 40):
            predictor.observe(layer_idx, chunk, np.ones(chunk.shape, np.float32), None)
    predictor.begin(PROMPT)
    forecast = predictor.before_token(0, 1)
    np.testing.assert_allclose(forecast.probability, counts / num_tokens, atol=5e-3)


def test_frequent_starts_out_uniform() -> None:
    forecast = FrequentPredictor(SHAPE).before_token(0, 1)
    assert np.unique(forecast.probability).tolist() == [SHAPE.top_k / SHAPE.num_experts]


SCORES = st.lists(
    st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=8), min_size=1, max_size=4
)


@settings(deadline=None)
@given(SCORES, st.sampled_from([1e-3, 0.1, 0.5, 2.0, 100.0]), st.integers(1, 8))
def test_inclusion_probabilities_sum_to_top_k_in_the_order_of_the_scores(
    rows: list[list[float]], temperature: float, top_k: int
) -> None:
    scores = np.array(rows, np.float32)
    probability, _ = inclusion_probability(scores, np.full(len(rows), temperature), top_k=top_k)
    np.testing.assert_allclose(probability.sum(axis=-1), top_k, atol=0.011)
    assert (probability >= 0).all() and (probability <= 1).all()
    order = np.argsort(scores, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(probability, order, axis=-1), axis=-1) >= -1e-9).all()


def test_inclusion_probabilities_follow_their_definition() -> None:
    scores = np.random.default_rng(0).normal(3.0, 2.0, (5, 16))
    probability, log_odds = inclusion_probability(scores, np.full(5, 0.4), top_k=4)
    for row, (result, odds) in enumerate(zip(probability, log_odds, strict=True)):
        low, high = -100.0, 100.0
        for _ in range(100):
            threshold = (low + high) / 2
            expected = 1 / (1 + np.exp(-(scores[row] - threshold) / (0.4 * scores[row].std())))
            low, high = (threshold, high) if expected.sum() > 4 else (low, threshold)
        np.testing.assert_allclose(result, expected, atol=4e-3)
        np.testing.assert_allclose(1 / (1 + np.exp(-odds)), result, atol=1e-9)


def test_scores_that_are_not_numbers_end_and_are_refused_by_the_check() -> None:
    predictor = LookaheadPredictor(SHAPE, make_gates())
    predictor.begin(PROMPT)
    forecast = predictor.in_pass(0, torch.full((1, SHAPE.hidden_size), float("nan")))
    assert forecast is not None
    with pytest.raises(ValueError, match="NaN"):
        forecast.check(SHAPE)
    predictor.observe(1, np.arange(4)[None], np.ones((1, 4), np.float32), None)
    assert np.isfinite(predictor.temperature).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lookahead_ranks_by_the_later_gates_own_scores(scoring: str, dtype: torch.dtype) -> None:
    gates = make_gates(dtype=dtype)
    predictor = LookaheadPredictor(SHAPE, gates, scoring=scoring, tokens="last")  # type: ignore[arg-type]
    predictor.begin(PROMPT)
    router_input = torch.randn(3, SHAPE.hidden_size)
    forecast = predictor.in_pass(0, router_input)
    assert forecast is not None and (forecast.layer_from, forecast.layer_to) == (1, 3)
    for index in range(2):
        weight, bias = (tensor.double() for tensor in gates[1 + index])
        logits = weight @ router_input[-1].to(dtype).double()
        scores = logits + bias if scoring == "softmax" else logits.sigmoid() + bias
        expected = set(scores.topk(SHAPE.top_k).indices.tolist())
        best = np.argsort(-forecast.probability[index])[: SHAPE.top_k]
        assert set(best.tolist()) == expected


def test_lookahead_stops_at_the_last_layer() -> None:
    predictor = LookaheadPredictor(SHAPE, make_gates(), depth=2)
    predictor.begin(PROMPT)
    router_input = torch.randn(1, SHAPE.hidden_size)
    near_end, at_end = predictor.in_pass(1, router_input), predictor.in_pass(2, router_input)
    assert near_end is not None and (near_end.layer_from, near_end.layer_to) == (2, 3)
    assert at_end is None


def test_all_tokens_forecast_the_union_of_their_experts() -> None:
    gates = make_gates()
    tokens = torch.randn(3, SHAPE.hidden_size)
    single = []
    for token in tokens:
        predictor = LookaheadPredictor(SHAPE, gates, tokens="last")
        forecast = predictor.in_pass(0, token[None])
        assert forecast is not None
        single.append(forecast.probability)
    union = LookaheadPredictor(SHAPE, gates, tokens="all").in_pass(0, tokens)
    assert union is not None
    missing = np.ones_like(single[0])
    for probability in single:
        missing *= 1.0 - probability
    np.testing.assert_allclose(union.probability, 1.0 - missing, atol=5e-3)


@pytest.mark.parametrize("first", [0.02, 5.0], ids=["overconfident", "underconfident"])
def test_lookahead_learns_how_far_its_scores_can_be_trusted(first: float) -> None:
    """A residual stream drifts by noise: claimed and observed rates agree once it was watched."""
    generator = torch.Generator().manual_seed(1)
    shape = ModelShape(4, 32, 4, 64, 8, "")
    gates = [(torch.randn(32, 64, generator=generator), None) for _ in range(4)]
    predictor = LookaheadPredictor(shape, gates)
    predictor.temperature[:] = first
    predictor.begin(PROMPT)
    claimed: list[list[np.ndarray]] = [[], []]
    observed: list[list[np.ndarray]] = [[], []]
    for token in range(260):
        predictor.before_token(0, 1)
        state = torch.randn(64, generator=generator)
        open_forecasts: dict[int, list[tuple[int, np.ndarray]]] = {}
        for layer_idx in range(4):
            chosen = (gates[layer_idx][0] @ state).topk(4).indices.numpy()
            if token >= 100:
                for distance, probability in open_forecasts.get(layer_idx, []):
                    claimed[distance].append(probability)
                    observed[distance].append(np.isin(np.arange(32), chosen))
            forecast = predictor.in_pass(layer_idx, state[None])
            if forecast is not None:
                for row, probability in enumerate(forecast.probability):
                    open_forecasts.setdefault(layer_idx + 1 + row, []).append((row, probability))
            predictor.observe(layer_idx, chosen[None], np.ones((1, 4), np.float32), None)
            state = state + 0.4 * torch.randn(64, generator=generator)
    for distance in range(2):
        says = np.concatenate(claimed[distance])
        is_used = np.concatenate(observed[distance])
        order = np.argsort(says)
        bins = np.array_split(order, 12)
        error = np.mean([abs(says[part].mean() - is_used[part].mean()) for part in bins])
        assert error < 0.015, f"distance {distance + 1}: calibration error {error:.3f}"
        confident = says > 0.5
        assert confident.mean() > 0.05
        assert is_used[confident].mean() == pytest.approx(says[confident].mean(), abs=0.04)
    assert predictor.temperature[0] < predictor.temperature[1], "trust falls with distance"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"gates": make_gates()[:2]}, "2 gates for 3"),
        ({"gates": [(torch.zeros(16, 31), None)] * 3}, r"\(16, 31\)"),
        ({"depth": 0}, "depth 0"),
        ({"scoring": "argmax"}, "argmax"),
        ({"tokens": "first"}, "first"),
    ],
    ids=["too-few", "wrong-size", "no-depth", "unknown-scoring", "unknown-tokens"],
)
def test_lookahead_refuses_what_does_not_fit(change: dict, complaint: str) -> None:
    options = {"gates": make_gates(), **change}
    with pytest.raises(ValueError, match=complaint):
        LookaheadPredictor(SHAPE, options.pop("gates"), **options)
