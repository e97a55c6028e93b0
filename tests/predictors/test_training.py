"""Training into a folder: what is learned is worth more than counting, kept, resumed, refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drift_traces import SHAPE, write_drift_traces

from outrider.collect.trace import open_traces
from outrider.predictors.base import family_class
from outrider.predictors.checkpoint import load_predictor, read_config
from outrider.predictors.context import window_of
from outrider.predictors.errors import FolderError, PredictorError, TrainingDataError
from outrider.predictors.examples import Examples
from outrider.predictors.fit import Run, refuse_leak, train_into
from outrider.predictors.journal import Journal
from outrider.predictors.presets import make_settings
from outrider.predictors.statistics import Statistics

BEFORE = ("statistics", "cluster", "pattern", "frequent", "hierarchical", "attention")
IN_PASS = ("lookahead-corrected", "pre-attention", "ensemble")
SETTINGS = make_settings(
    "small",
    {
        "width": 32, "heads": 2, "clusters": 3, "epochs": 10, "batch_size": 64, "lr": 6e-3,
        "dropout": 0.0, "patience": 10,
    },
)  # fmt: skip
SHORT = make_settings(
    "small", {"width": 16, "heads": 2, "clusters": 3, "epochs": 4, "batch_size": 128}
)
LAYERS = range(SHAPE.num_moe_layers)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces", documents=80, noise=0.1)


@pytest.fixture(scope="module")
def readers(drift):
    return open_traces([drift.folder])


@pytest.fixture(scope="module")
def test_split(readers):
    return Examples.read(readers, "test", hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def folders(readers, tmp_path_factory):
    """Every family, trained into a folder once."""
    made = {}
    for name in (*BEFORE, *IN_PASS):
        made[name] = tmp_path_factory.mktemp("trained") / name
        train_into(Run(name, SETTINGS, made[name]), readers)
    return made


def recall(family, examples, horizon=1):
    rows = examples.rows(horizon)
    forecast = family.forecasts(examples, rows, horizon=horizon)
    best = np.argsort(-forecast, axis=2)[:, :, : SHAPE.top_k]
    used = examples.membership(rows + horizon - 1)
    return float(np.take_along_axis(used, best, axis=2).mean())


def said(predictor, examples):
    """Everything a predictor says of three samples, in the engine's order of calls."""
    tables = []
    for start, end in zip(examples.sample_offsets[:3], examples.sample_offsets[1:4], strict=True):
        predictor.begin(examples.token_id[start : start + 3])
        for rows in (
            slice(start, start + 3),
            *(slice(row, row + 1) for row in range(start + 3, end)),
        ):
            if rows.start > start:
                tables += [
                    predictor.before_token(int(examples.token_id[rows.start]), horizon)
                    for horizon in (1, 2)
                ]
            for layer_idx in LAYERS:
                state = torch.from_numpy(examples.hidden[layer_idx][rows].astype(np.float32))
                tables.append(predictor.in_pass(layer_idx, state))
                ids = examples.topk_ids[rows, layer_idx].astype(np.int64)
                weights = examples.topk_weights[rows, layer_idx].astype(np.float32)
                predictor.observe(layer_idx, ids, weights, state)
    for one in tables:
        if one is not None:
            one.check(SHAPE)
    return [one.probability for one in tables if one is not None]


@pytest.mark.parametrize("name", [*BEFORE, *IN_PASS])
def test_what_was_saved_says_the_same_bit_for_bit(name, folders, readers, test_split):
    splits = (Examples.read(readers, one, hidden_layers=LAYERS) for one in ("train", "validation"))
    if name in ("statistics", "cluster", "pattern", "frequent"):
        splits = (Examples.read(readers, one) for one in ("train", "validation"))
    train, validation = splits
    fitted = family_class(name).fit(
        train, validation=validation, settings=SETTINGS, progress=Journal()
    )
    loaded = load_predictor(folders[name], SHAPE)
    assert loaded.name == name and loaded.hidden_layers == fitted.hidden_layers
    gates = test_split.gates if loaded.needs_gates else None
    one, other = (said(each.make(gates), test_split) for each in (fitted, loaded))
    assert len(one) == len(other) > 0
    # Fitted twice with one seed, once into a folder: deterministic and kept, in one test.
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ["hierarchical", "attention"])
def test_the_learned_beat_statistics_on_documents_they_never_saw(name, folders, test_split):
    statistics = load_predictor(folders["statistics"], SHAPE)
    learned = load_predictor(folders[name], SHAPE)
    assert recall(learned, test_split) > recall(statistics, test_split) + 0.05
    # The token after the next is drawn anew: there is little to know, and nothing to lose.
    assert recall(learned, test_split, 2) > recall(statistics, test_split, 2) - 0.03


@pytest.mark.parametrize("name", ["statistics", "pattern"])
def test_counting_beats_the_most_frequent(name, folders, test_split):
    frequent = load_predictor(folders["frequent"], SHAPE)
    counted = load_predictor(folders[name], SHAPE)
    assert recall(counted, test_split) > recall(frequent, test_split) + 0.01


def test_running_says_what_recorded_windows_say(folders, test_split):
    """The path in numpy against the network itself, over contexts of every length."""
    family = load_predictor(folders["hierarchical"], SHAPE)
    start, end = test_split.sample_offsets[:2]
    predictor = family.make()
    predictor.begin(test_split.token_id[start : start + 1])
    for row in range(start, end):
        if row > start:
            for horizon in (1, 2):
                window = window_of(
                    test_split, np.array([row]), context=family.context,
                    hidden_layers=family.hidden_layers,
                )  # fmt: skip
                recorded = family.log_odds(window, horizon)
                forecast = predictor.before_token(int(test_split.token_id[row]), horizon)
                expected = family.calibration.probability(recorded, horizon)[0]
                np.testing.assert_allclose(forecast.probability, expected, atol=2e-3)
        for layer_idx in LAYERS:
            rows = slice(row, row + 1)
            state = torch.from_numpy(test_split.hidden[layer_idx][rows].astype(np.float32))
            predictor.observe(
                layer_idx,
                test_split.topk_ids[rows, layer_idx].astype(np.int64),
                test_split.topk_weights[rows, layer_idx].astype(np.float32),
                state,
            )


def test_confidence_comes_true(folders, test_split):
    family = load_predictor(folders["attention"], SHAPE)
    rows = test_split.rows()
    window = window_of(test_split, rows, context=family.context, hidden_layers=family.hidden_layers)
    claimed = family.confidence(window)
    best = np.argsort(-family.log_odds(window, 1), axis=2)[:, :, : SHAPE.top_k]
    right = np.take_along_axis(test_split.membership(rows), best, axis=2).mean(axis=2)
    # Layer by layer, noise piling up from one to the next.
    assert right.mean(axis=0)[0] > right.mean(axis=0)[-1]
    np.testing.assert_allclose(claimed.mean(axis=0), right.mean(axis=0), atol=0.06)


@pytest.mark.parametrize("max_tokens", [200, 1000])
def test_fewer_tokens_come_from_all_over_the_traces(drift, readers, max_tokens):
    whole = Examples.read(readers, "train", hidden_layers=LAYERS)
    some = Examples.read(readers, "train", hidden_layers=LAYERS, max_tokens=max_tokens)
    longest = int(np.diff(whole.sample_offsets).max())
    assert abs(len(some) - max_tokens) <= max_tokens / 10 + 2 * longest
    assert len(some) < len(whole)
    places = np.flatnonzero(np.isin(whole.document_id, some.document_id)) / len(whole)
    assert places.min() < 0.25 and places.max() > 0.75


def test_no_test_document_is_read_for_training(drift, readers, tmp_path, monkeypatch):
    read = []
    inner = Examples.read.__func__

    def spy(cls, readers, split, **options):
        found = inner(cls, readers, split, **options)
        read.append((split, set(found.document_id.tolist())))
        return found

    monkeypatch.setattr(Examples, "read", classmethod(spy))
    train_into(Run("statistics", SHORT, tmp_path / "P"), readers)
    tested = set(drift.document_id[drift.split == 2].tolist())
    assert [split for split, _ in read] == ["train", "validation"] and tested
    for _, documents in read:
        assert documents and not documents & tested
    assert not read[0][1] & read[1][1]


def test_a_document_in_two_splits_is_refused(readers):
    train, validation = (Examples.read(readers, split) for split in ("train", "validation"))
    leaked = validation.document_id.copy()
    leaked[:12] = train.document_id[0]
    with pytest.raises(TrainingDataError, match="1 documents are in the train and"):
        refuse_leak(train, replace(validation, document_id=leaked))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", ["epoch 3", "learning the drift from layer 1"])
def test_a_resumed_training_equals_one_that_was_not_interrupted(stop_at, readers, tmp_path):
    # So many steps a stage that its progress is told.
    settings = make_settings(
        "small", {"width": 16, "heads": 2, "clusters": 3, "epochs": 4, "batch_size": 32}
    )

    def stop(what, done, total):
        if what == stop_at:
            raise Interrupted

    whole, part = tmp_path / "whole", tmp_path / "part"
    train_into(Run("ensemble", settings, whole), readers)
    with pytest.raises(Interrupted):
        train_into(Run("ensemble", settings, part), readers, tell=stop)
    with pytest.raises(FolderError, match="interrupted training; go on with --resume"):
        train_into(Run("ensemble", settings, part), readers)
    other = make_settings("small", {"width": 16, "heads": 2, "clusters": 3, "lr": 0.1})
    with pytest.raises(PredictorError, match=r"other settings: .*lr 0\.002, now 0\.1"):
        train_into(Run("ensemble", other, part, resume=True), readers)
    again = []
    train_into(
        Run("ensemble", settings, part, resume=True),
        readers,
        tell=lambda what, done, total: again.append(what),
    )
    assert "epoch 1" not in again, "an epoch that was finished is not run again"
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (part / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert not list(part.glob("training-*"))
    # Ended, and asked to go on: nothing is done.
    written = (part / "model.safetensors").stat().st_mtime_ns
    assert train_into(Run("ensemble", settings, part, resume=True), readers)["metrics"]
    assert (part / "model.safetensors").stat().st_mtime_ns == written


def test_another_seed_gives_another_network(readers, folders, tmp_path):
    settings = make_settings("small", {**_given(SHORT), "seed": 1})
    weights = []
    for index, one in enumerate((SHORT, SHORT, settings)):
        train_into(Run("hierarchical", one, tmp_path / str(index)), readers)
        weights.append((tmp_path / str(index) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def _given(settings):
    names = ("width", "heads", "clusters", "epochs", "batch_size")
    return {name: getattr(settings, name) for name in names}


def test_what_was_trained_is_described(folders):
    config = read_config(folders["hierarchical"])
    assert config["training"]["settings"]["width"] == 32
    assert config["training"]["train_tokens"] > 1000
    assert 0.3 < config["metrics"]["validation_recall_at_k_1"] <= 1.0
    text = (folders["hierarchical"] / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_without_hidden_states_routing_alone_is_learned(drift, tmp_path):
    poor = write_drift_traces(tmp_path / "traces", documents=60, hidden_layers=())
    readers = open_traces([poor.folder])
    with pytest.raises(TrainingDataError, match="--features routing"):
        train_into(Run("hierarchical", SHORT, tmp_path / "P"), readers)
    with pytest.raises(TrainingDataError, match="--hidden-states"):
        train_into(Run("ensemble", SHORT, tmp_path / "Q"), readers)
    routing = make_settings("small", {**_given(SHORT), "features": "routing"})
    train_into(Run("hierarchical", routing, tmp_path / "R"), readers)
    assert load_predictor(tmp_path / "R", SHAPE).hidden_layers == ()


def test_too_few_traces_are_refused(tmp_path):
    few = write_drift_traces(tmp_path / "traces", documents=4)
    with pytest.raises(
        TrainingDataError, match=r"4 training samples, at least 8 .*collect more traces"
    ):
        train_into(Run("hierarchical", SHORT, tmp_path / "P"), open_traces([few.folder]))


def test_a_folder_that_holds_something_is_left_alone(readers, folders, tmp_path):
    with pytest.raises(FolderError, match=r"already holds a predictor \(statistics\)"):
        train_into(Run("pattern", SHORT, folders["statistics"]), readers)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"not empty \(thesis\.txt\)"):
        train_into(Run("statistics", SHORT, tmp_path), readers)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_two_trainings_do_not_share_a_folder(readers, tmp_path):
    import filelock

    folder = tmp_path / "P"
    folder.mkdir()
    with (
        filelock.FileLock(folder / ".lock"),
        pytest.raises(FolderError, match="another process is training into"),
    ):
        train_into(Run("statistics", SHORT, folder), readers)


def test_losses_curriculum_and_balance_can_all_be_trained_with(readers, tmp_path):
    for index, options in enumerate(
        ({"loss": "softmax"}, {"loss": "focal"}, {"curriculum": "frequent-first"},
         {"balanced": True}, {"checkpointing": True}, {"auxiliary_weight": 0.0})
    ):  # fmt: skip
        settings = make_settings("small", {**_given(SHORT), "epochs": 2, **options})
        train_into(Run("hierarchical", settings, tmp_path / str(index)), readers)
        metrics = read_config(tmp_path / str(index))["metrics"]
        assert metrics["validation_recall_at_k_1"] > 0.4


@pytest.mark.slow
def test_two_processes_train_one_predictor(drift, tmp_path):
    """`torchrun` with two processes on the CPU: one folder, as good as one process's."""
    script = Path(sys.executable).with_name("outrider")
    options = {
        "--predictor": "hierarchical", "--out": tmp_path / "P", "--width": 32, "--heads": 2,
        "--clusters": 3, "--epochs": 8, "--batch-size": 128, "--lr": 0.006, "--dropout": 0,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        "29511", "--no-python", str(script), "train", str(drift.folder),
        *(str(part) for option in options.items() for part in option),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = (tmp_path / "P" / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 8, "only one process keeps the log"
    test = Examples.read(open_traces([drift.folder]), "test", hidden_layers=LAYERS)
    learned = load_predictor(tmp_path / "P", SHAPE)
    statistics = learned.statistics
    assert isinstance(statistics, Statistics)
    assert recall(learned, test) > recall(statistics, test) + 0.05


def test_damage_is_found(folders, tmp_path):
    import shutil

    folder = tmp_path / "P"
    shutil.copytree(folders["hierarchical"], folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(PredictorError, match="is damaged"):
        load_predictor(folder, SHAPE)
    weights.unlink()
    with pytest.raises(PredictorError, match="cannot be read"):
        load_predictor(folder, SHAPE)
    (folder / "config.json").write_text("{")
    with pytest.raises(PredictorError, match="does not describe a predictor"):
        load_predictor(folder, SHAPE)
    with pytest.raises(PredictorError, match="is not a predictor"):
        load_predictor(Path(tmp_path / "nothing"), SHAPE)


def test_another_models_predictor_is_refused_with_the_difference(folders):
    other = SHAPE.__class__(4, 16, 3, 16, 8, "other")
    with pytest.raises(PredictorError) as caught:
        load_predictor(folders["hierarchical"], other)
    assert "num_experts is 12, the model's is 16" in str(caught.value)
    assert "fingerprint is 'drift-0', the model's is 'other'" in str(caught.value)
