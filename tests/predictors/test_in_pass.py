"""Families that forecast in the pass, on a model whose state drifts linearly: a known answer."""

import numpy as np
import pytest
import torch
from drift_traces import SHAPE, write_drift_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collect.trace import TraceReader
from outrider.predictors import metrics
from outrider.predictors.base import Forecast, family_class
from outrider.predictors.calibration import inclusion
from outrider.predictors.checkpoint import load_predictor, save_predictor
from outrider.predictors.errors import PredictorError, TrainingDataError
from outrider.predictors.examples import Examples
from outrider.predictors.in_pass import quick_inclusion
from outrider.predictors.journal import Journal
from outrider.predictors.lookahead import LookaheadPredictor
from outrider.predictors.oracle import Oracle
from outrider.predictors.pre_attention import routed
from outrider.predictors.presets import Settings
from outrider.predictors.stacking import fit_slopes, log_odds_of

NAMES = ("lookahead-corrected", "pre-attention")
LAYERS = range(SHAPE.num_moe_layers)


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces", documents=160)


@pytest.fixture(scope="module")
def splits(drift):
    readers = [TraceReader(drift.folder)]
    return {
        name: Examples.read(readers, name, hidden_layers=LAYERS)
        for name in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def fitted(splits):
    return {
        name: family_class(name).fit(
            splits["train"],
            validation=splits["validation"],
            settings=Settings(),
            progress=Journal(),
        )
        for name in NAMES
    }


def recalls(predictor, examples):
    """Recall at k by distance over single tokens."""
    found = {}
    for row in range(0, len(examples), 3):
        predictor.begin(np.arange(1))
        for layer_idx in LAYERS:
            state = torch.from_numpy(examples.hidden[layer_idx][row : row + 1].astype(np.float32))
            forecast = predictor.in_pass(layer_idx, state)
            ids = examples.topk_ids[row : row + 1, layer_idx].astype(np.int64)
            predictor.observe(layer_idx, ids, np.ones(ids.shape, np.float32), state)
            if forecast is None:
                assert layer_idx == SHAPE.num_moe_layers - 1
                continue
            forecast.check(SHAPE)
            assert (forecast.layer_from, forecast.layer_to) == (layer_idx + 1, len(LAYERS))
            used = examples.topk_ids[row, layer_idx + 1 :].astype(np.int64)
            ranking = metrics.ranked(forecast.probability, SHAPE.top_k)
            for place, share in enumerate(metrics.recall(ranking, used)):
                found.setdefault(place + 1, []).append(share)
    return {distance: float(np.mean(shares)) for distance, shares in found.items()}


class TrueMap:
    """Ranks by the drift that was planted: nothing that reads this layer alone can know more."""

    def __init__(self, drift):
        self.drift = drift

    def begin(self, prompt_ids):
        pass

    def in_pass(self, layer_idx, state):
        if layer_idx + 1 == len(LAYERS):
            return None
        state, rows = state.numpy().astype(np.float64), []
        for later in LAYERS[layer_idx + 1 :]:
            state = state @ self.drift.drift[later - 1]
            logits = (state @ self.drift.gates[later].T).astype(np.float32)
            rows.append(inclusion(logits, SHAPE.top_k)[0])
        return Forecast(0, layer_idx + 1, len(LAYERS), np.stack(rows))

    def observe(self, *arguments):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_corrections_undo_a_linear_drift_that_bare_gates_do_not_see(name, fitted, splits, drift):
    gates = splits["train"].gates
    best = recalls(TrueMap(drift), splits["test"])
    bare = LookaheadPredictor(SHAPE, gates, depth=3, tokens="last")
    before, after = (
        recalls(predictor, splits["test"])
        for predictor in (bare, fitted[name].make(gates, tokens="last"))
    )
    for distance in (1, 2, 3):
        # Least squares is drawn to rows whose state the norm between the layers made large.
        assert after[distance] > best[distance] - 0.1, (distance, before, after, best)
        assert after[distance] > before[distance] + 0.3


@pytest.mark.parametrize("name", NAMES)
def test_claims_come_true_as_often_as_they_say(name, fitted, splits):
    examples = splits["test"]
    predictor = fitted[name].make(splits["train"].gates, tokens="last")
    forecasts, used = [], []
    for row in range(len(examples)):
        predictor.begin(np.arange(1))
        state = torch.from_numpy(examples.hidden[1][row : row + 1].astype(np.float32))
        probability = predictor.in_pass(1, state).probability[0]
        np.testing.assert_allclose(probability.sum(), SHAPE.top_k, rtol=0.02)
        forecasts.append(probability)
        used.append(examples.membership(np.array([row]))[0, 2])
    forecasts, used = np.concatenate(forecasts), np.concatenate(used)
    table = metrics.reliability(forecasts, used, edges=metrics.bin_edges(forecasts, bins=8))
    assert table.error()[0] < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_family_answers_as_before(name, fitted, splits, tmp_path):
    gates = splits["train"].gates
    tensors, config = fitted[name].state()
    save_predictor(tmp_path / "P", family=name, shape=SHAPE, tensors=tensors, config=config)
    loaded = load_predictor(tmp_path / "P", SHAPE)
    assert loaded.name == name and loaded.needs_gates
    assert loaded.hidden_layers == tuple(LAYERS)
    state = torch.randn(1, SHAPE.hidden_size)
    tables = [one.make(gates).in_pass(0, state).probability for one in (fitted[name], loaded)]
    np.testing.assert_array_equal(*tables)
    wrong = dict(tensors) | {"offset": tensors["offset"][:, :, 1:]}
    save_predictor(tmp_path / "Q", family=name, shape=SHAPE, tensors=wrong, config=config)
    with pytest.raises(PredictorError, match="'offset' has shape"):
        load_predictor(tmp_path / "Q", SHAPE)
    with pytest.raises(ValueError, match="needs the model's gates"):
        loaded.make(None)


@pytest.mark.parametrize("name", NAMES)
def test_several_tokens_forecast_the_union(name, fitted, splits):
    gates = splits["train"].gates
    states = torch.randn(3, SHAPE.hidden_size)
    whole = fitted[name].make(gates, tokens="all").in_pass(0, states).probability
    single = np.stack(
        [fitted[name].make(gates).in_pass(0, states[one : one + 1]).probability for one in range(3)]
    )
    np.testing.assert_allclose(whole, 1 - np.prod(1 - single, axis=0), atol=1e-5)
    last = fitted[name].make(gates, tokens="last").in_pass(0, states).probability
    np.testing.assert_allclose(last, single[2], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_traces_without_all_states_are_refused_with_what_to_do(name, drift):
    readers = [TraceReader(drift.folder)]
    examples = Examples.read(readers, "train", hidden_layers=(2, 3))
    with pytest.raises(TrainingDataError, match=r"0, 1 .*--hidden-states all"):
        family_class(name).fit(
            examples, validation=examples, settings=Settings(), progress=Journal()
        )


LOG_ODDS = st.lists(st.floats(-40, 40, width=32), min_size=9, max_size=9)


@settings(deadline=None)
@given(st.lists(LOG_ODDS, min_size=1, max_size=3), st.integers(1, 9))
def test_quick_inclusion_keeps_the_order_and_nearly_sums_to_top_k(rows, top_k):
    log_odds = np.array(rows, np.float32)
    probability = quick_inclusion(log_odds, top_k)
    assert probability.dtype == np.float32
    assert (probability >= 0).all() and (probability <= 1).all()
    order = np.argsort(log_odds, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(probability, order, axis=-1), axis=-1) >= -1e-6).all()


def test_quick_inclusion_is_inclusion_on_scores_as_they_come():
    scores = np.random.default_rng(0).normal(0, 2.5, (500, 64)).astype(np.float32)
    quick, exact = quick_inclusion(scores, 6), inclusion(scores, 6)
    np.testing.assert_allclose(quick.sum(axis=1), 6, rtol=0.01)
    np.testing.assert_allclose(quick, exact, atol=0.01)


def test_slopes_find_which_source_to_trust():
    generator = np.random.default_rng(0)
    truth = generator.normal(0, 2, (3000, 16)).astype(np.float32)
    good = truth + generator.normal(0, 0.5, truth.shape).astype(np.float32)
    poor = 10 * (truth + generator.normal(0, 3.0, truth.shape)).astype(np.float32)
    noise = generator.normal(0, 1, truth.shape).astype(np.float32)
    noisy = truth + generator.logistic(0, 1, truth.shape)
    used = np.zeros(truth.shape, bool)
    np.put_along_axis(used, np.argsort(-noisy, axis=1)[:, :4], True, axis=1)
    slopes = fit_slopes([good, poor, noise], used, top_k=4)
    assert slopes[0] > 0.5 and abs(slopes[2]) < 0.05
    assert slopes[0] * good.std() > 5 * slopes[1] * poor.std() > 0

    def loss(weights):
        mixed = weights[0] * good + weights[1] * poor + weights[2] * noise
        odds = log_odds_of(inclusion(mixed.astype(np.float32), 4), floor=1e-7)
        return np.logaddexp(0, np.where(used, -odds, odds)).mean()

    best = loss(slopes)
    for place in range(3):
        for change in (-0.1, 0.1):
            other = slopes.copy()
            other[place] += change * max(abs(slopes[place]), 0.1)
            assert loss(other) > best - 1e-5


def test_a_layers_own_choice_is_its_top_k():
    logits = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    shares = routed(logits, None, top_k=3, scoring="softmax")
    whole = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, share in enumerate(shares):
        chosen = set(np.argsort(-logits[row])[:3].tolist())
        assert set(np.flatnonzero(share).tolist()) == chosen
        np.testing.assert_allclose(share[list(chosen)], whole[row][list(chosen)], rtol=1e-5)


def test_the_oracle_tells_what_was_recorded():
    topk_ids = np.random.default_rng(0).random((6, 4, 12)).argsort(axis=-1)[..., :3]
    oracle = Oracle(SHAPE)
    oracle.foresee(topk_ids)
    oracle.begin(np.arange(2))
    for token in range(2, 6):
        for horizon in (1, 2):
            forecast = oracle.before_token(0, horizon)
            if token + horizon - 1 >= 6:
                assert forecast is None
                continue
            forecast.check(SHAPE)
            ranking = metrics.ranked(forecast.probability, 3)
            np.testing.assert_array_equal(ranking, topk_ids[token + horizon - 1])
        forecast = oracle.in_pass(1, torch.zeros(1, SHAPE.hidden_size))
        np.testing.assert_array_equal(metrics.ranked(forecast.probability, 3), topk_ids[token, 2:])


def test_an_oracle_that_was_not_asked_for_some_steps_speaks_of_the_present() -> None:
    """A controller at rest asks nobody, and the sequence goes on."""
    topk_ids = np.random.default_rng(0).random((9, 4, 12)).argsort(axis=-1)[..., :3]
    step = 0
    oracle = Oracle(SHAPE)
    oracle.foresee(topk_ids)
    oracle.begin(np.arange(2))
    oracle.follow(lambda: step)
    for step in (1, 5, 7):
        row = 2 + step - 1
        forecast = oracle.before_token(0, 1)
        assert forecast.step == step
        np.testing.assert_array_equal(metrics.ranked(forecast.probability, 3), topk_ids[row])
        forecast = oracle.in_pass(1, torch.zeros(1, SHAPE.hidden_size))
        np.testing.assert_array_equal(metrics.ranked(forecast.probability, 3), topk_ids[row, 2:])
