"""The ensemble: better than its parts, the same after a round trip, calm with a source missing."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from drift_traces import SHAPE, WINDOW, write_drift_traces

from outrider.collect.trace import TraceReader
from outrider.kernels import forecast as native
from outrider.predictors import metrics
from outrider.predictors.base import family_class
from outrider.predictors.checkpoint import load_predictor, save_predictor
from outrider.predictors.drift import LiveStage, bent, features_of, past_layers
from outrider.predictors.ensemble import Ensemble
from outrider.predictors.errors import PredictorError, TrainingDataError
from outrider.predictors.examples import Examples
from outrider.predictors.journal import Journal
from outrider.predictors.presets import Settings

LAYERS = range(SHAPE.num_moe_layers)
SETTINGS = Settings(epochs=40, batch_size=64)


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift") / "traces"
    return write_drift_traces(folder, documents=160, noise=0.25)


@pytest.fixture(scope="module")
def splits(drift):
    readers = [TraceReader(drift.folder)]
    return {
        name: Examples.read(readers, name, hidden_layers=LAYERS)
        for name in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def before(splits):
    return family_class("statistics").fit(
        splits["train"],
        validation=splits["validation"],
        settings=Settings(),
        progress=Journal(),
    )


@pytest.fixture(scope="module")
def ensemble(before, splits):
    return Ensemble.around(
        before,
        splits["train"],
        validation=splits["validation"],
        settings=SETTINGS,
        progress=Journal(),
    )


def replay(predictor, examples, *, asks_before=True):
    """Recall at k by (moment, distance), driving the protocol over whole samples."""
    found = {}
    offsets = examples.sample_offsets
    for start, end in pairwise(offsets[:41]):
        predictor.begin(examples.token_id[start : start + 2])
        list(run(predictor, examples, slice(start, start + 2)))
        for row in range(start + 2, end):
            if asks_before:
                forecast = predictor.before_token(int(examples.token_id[row]), 1)
                forecast.check(SHAPE)
                assert forecast.step == row - start - 1
                note(found, ("before", 1), forecast.probability, examples.topk_ids[row])
            for layer_idx, forecast in run(predictor, examples, slice(row, row + 1)):
                if forecast is None:
                    continue
                forecast.check(SHAPE)
                assert forecast.step == row - start - 1
                later = examples.topk_ids[row, layer_idx + 1 :]
                for place, target in enumerate(later):
                    table = forecast.probability[place : place + 1]
                    note(found, ("in_pass", place + 1), table, target[None])
    return {kind: float(np.mean(shares)) for kind, shares in found.items()}


def run(predictor, examples, rows):
    for layer_idx in LAYERS:
        state = torch.from_numpy(examples.hidden[layer_idx][rows].astype(np.float32))
        yielded = predictor.in_pass(layer_idx, state)
        ids = examples.topk_ids[rows, layer_idx].astype(np.int64)
        predictor.observe(layer_idx, ids, np.ones(ids.shape, np.float32), state)
        yield layer_idx, yielded


def note(found, kind, table, ids):
    ranking = metrics.ranked(table, SHAPE.top_k)
    found.setdefault(kind, []).extend(metrics.recall(ranking, ids.astype(np.int64)).tolist())


def test_it_beats_its_parts_in_the_pass(ensemble, before, splits):
    gates = splits["train"].gates
    whole = replay(ensemble.make(gates, tokens="last"), splits["test"])
    alone = replay(ensemble.make(gates, tokens="last"), splits["test"], asks_before=False)
    assert whole["before", 1] == replay_before(before, splits["test"])
    for distance in (1, 2, 3):
        # A second source that knows less does no harm.
        assert whole["in_pass", distance] > alone["in_pass", distance] - 0.01
    assert whole["in_pass", 1] > whole["before", 1] + 0.02


def replay_before(before, examples):
    found = {}
    predictor = before.make()
    for start, end in zip(
        examples.sample_offsets[:40], examples.sample_offsets[1:41], strict=False
    ):
        predictor.begin(examples.token_id[start : start + 2])
        list(run(predictor, examples, slice(start, start + 2)))
        for row in range(start + 2, end):
            forecast = predictor.before_token(int(examples.token_id[row]), 1)
            note(found, "before", forecast.probability, examples.topk_ids[row])
            list(run(predictor, examples, slice(row, row + 1)))
    return float(np.mean(found["before"]))


def test_running_sees_the_features_it_was_trained_on(ensemble, splits, monkeypatch):
    examples, gates = splits["test"], splits["test"].gates
    seen = []
    monkeypatch.setattr(native, "is_available", lambda: False)
    ensemble = Ensemble(ensemble.before, ensemble.stages, ensemble.slopes)
    corrections = LiveStage.corrections
    monkeypatch.setattr(
        LiveStage, "corrections", lambda self, x: (seen.append(x.copy()), corrections(self, x))[1]
    )
    predictor = ensemble.make(gates, tokens="last")
    predictor.begin(examples.token_id[:1])
    list(run(predictor, examples, slice(0, 1)))
    predictor.before_token(int(examples.token_id[1]), 1)
    seen.clear()
    list(run(predictor, examples, slice(1, 2)))
    assert len(seen) == SHAPE.num_moe_layers - 1
    for layer_idx, live in enumerate(seen):
        recorded = features_of(examples, np.array([1]), layer_idx, gates)
        np.testing.assert_allclose(live, recorded, rtol=1e-3, atol=1e-3)


def test_two_sequences_that_share_what_was_made_ready_do_not_mix(ensemble, splits):
    examples, gates = splits["test"], splits["test"].gates
    starts = [int(start) for start in examples.sample_offsets[:2]]

    def passes(predictor, start):
        predictor.begin(examples.token_id[start : start + 1])
        for row in range(start, start + 4):
            predictor.before_token(int(examples.token_id[row]), 1)
            for _, forecast in run(predictor, examples, slice(row, row + 1)):
                yield None if forecast is None else forecast.probability

    def make():
        return ensemble.make(gates, tokens="last")

    alone = [list(passes(make(), start)) for start in starts]
    beside = list(zip(*(passes(make(), start) for start in starts), strict=True))
    for one, other in zip(alone, zip(*beside, strict=True), strict=True):
        for expected, found in zip(one, other, strict=True):
            assert (expected is None) == (found is None)
            if found is not None:
                np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(beside[0][0], beside[0][1])


def test_a_saved_ensemble_holds_all_of_it(ensemble, splits, tmp_path):
    tensors, config = ensemble.state()
    save_predictor(tmp_path / "P", family="ensemble", shape=SHAPE, tensors=tensors, config=config)
    loaded = load_predictor(tmp_path / "P", SHAPE)
    assert loaded.name == "ensemble" and loaded.hidden_layers == tuple(LAYERS)
    np.testing.assert_array_equal(loaded.frequencies, ensemble.frequencies)
    gates = splits["test"].gates
    rates = [replay(one.make(gates, tokens="last"), splits["test"]) for one in (ensemble, loaded)]
    assert rates[0] == rates[1]
    del tensors["1.up"]
    save_predictor(tmp_path / "Q", family="ensemble", shape=SHAPE, tensors=tensors, config=config)
    with pytest.raises(PredictorError, match=r"'1\.up' is missing"):
        load_predictor(tmp_path / "Q", SHAPE)


def test_without_gates_it_speaks_before_the_token_only(ensemble, splits):
    predictor = ensemble.make(None)
    predictor.begin(np.arange(3))
    assert predictor.in_pass(0, torch.zeros(1, SHAPE.hidden_size)) is None
    predictor.observe(0, np.zeros((3, 3), np.int64), np.ones((3, 3), np.float32), None)
    assert predictor.before_token(1, 1) is not None


def test_a_prompt_of_many_tokens_is_a_union(ensemble, splits):
    examples = splits["test"]
    predictor = ensemble.make(examples.gates, tokens="all")
    predictor.begin(examples.token_id[:WINDOW])
    for layer_idx, forecast in run(predictor, examples, slice(0, WINDOW)):
        if layer_idx < SHAPE.num_moe_layers - 1:
            forecast.check(SHAPE)
            assert forecast.step == 0 and forecast.probability.sum(axis=1).min() > SHAPE.top_k


def test_an_interrupted_training_goes_on_where_it_was(before, splits, tmp_path):
    fitting = {"validation": splits["validation"], "settings": Settings(epochs=2)}
    whole = Ensemble.around(before, splits["train"], progress=Journal(tmp_path), **fitting)
    steps = [line["stage"] for line in Journal(tmp_path, resume=True).lines()]
    assert steps == [0, 1, 2]
    again = Ensemble.around(
        before, splits["train"], progress=Journal(tmp_path, resume=True), **fitting
    )
    assert len(Journal(tmp_path, resume=True).lines()) == 3, "nothing is fitted twice"
    for name, tensor in whole.state()[0].items():
        np.testing.assert_array_equal(tensor, again.state()[0][name])


def test_traces_without_all_states_are_refused(drift):
    examples = Examples.read([TraceReader(drift.folder)], "train", hidden_layers=(2, 3))
    with pytest.raises(TrainingDataError, match=r"0, 1 .*--hidden-states all"):
        Ensemble.fit(examples, validation=examples, settings=Settings(), progress=Journal())


def test_bent_is_its_definition():
    values = np.linspace(-6, 6, 41, dtype=np.float32)
    np.testing.assert_allclose(bent(values), values / (1 + np.exp(-1.702 * values)), atol=1e-6)
    assert past_layers(SHAPE, 0) == (1, 3) and past_layers(SHAPE, 2) == (3, 3)
