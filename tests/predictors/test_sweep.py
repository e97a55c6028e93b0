"""Sweeps: bad spaces are named, trials follow from the seed, poor ones end early, resumes agree."""

import json

import pytest
from drift_traces import write_drift_traces

from outrider.predictors.errors import FolderError, SettingsError
from outrider.predictors.space import Choice, Range, make_space, read_space

SMALL = {"predictor": "hierarchical", "heads": 2, "clusters": 2, "epochs": 3, "batch_size": 64}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces").folder


def test_a_space_is_what_was_written(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "lr: {low: 5e-4, high: 1e-2, log: true}\nwidth: [64, 128]\nlayers: {low: 1, high: 4}\n"
        "predictor: [hierarchical, attention]\nbalanced: [true, false]\nclip: 1e-1\n"
    )
    assert make_space(read_space(tmp_path / "space.yaml")) == {
        "lr": Range(5e-4, 1e-2, log=True),
        "width": Choice((64, 128)),
        "layers": Range(1.0, 4.0, is_whole=True),
        "predictor": Choice(("hierarchical", "attention")),
        "balanced": Choice((True, False)),
        "clip": Choice((0.1,)),
    }


BAD = [
    pytest.param("", "accepted is a mapping of fields", id="empty"),
    pytest.param("[1, 2]", "accepted is a mapping of fields", id="list"),
    pytest.param("lr: [", "is not YAML", id="not-yaml"),
    pytest.param("lernrate: [1]", "'lernrate' cannot vary; fields that can: predictor", id="name"),
    pytest.param("seed: [1, 2]", "'seed' cannot vary", id="seed"),
    pytest.param("lr: []", "lr has no values", id="no-values"),
    pytest.param("lr: [fast]", "lr: 'fast' is not a number", id="word"),
    pytest.param("lr: [.nan]", "lr: lr is nan", id="nan"),
    pytest.param("lr: [[1]]", r"lr: \[1\] is not a number", id="nested"),
    pytest.param("lr: {low: 0.1}", "lr: Object missing required field `high`", id="no-high"),
    pytest.param("lr: {low: 1, high: 0.1}", "lr: low 1 to high 0.1 is no range", id="reversed"),
    pytest.param("lr: {low: 0.1, high: 3}", "lr: lr is 3.0; accepted is", id="out-of-range"),
    pytest.param("dropout: {low: 0, high: 0.5, log: true}", "dropout: log needs", id="log-of-0"),
    pytest.param("lr: {low: 0.1, high: 1, steps: 3}", "accepted are low, high, log", id="key"),
    pytest.param("width: {low: 16, high: 32, step: 0}", "width: step is above 0", id="step-0"),
    pytest.param("width: {low: 16, high: 32.5}", "width is a whole number", id="not-whole"),
    pytest.param("epochs: [true]", "epochs: True is not a whole number", id="switch"),
    pytest.param("width: [30]", "width: width 30 is no multiple of heads 4", id="heads"),
    pytest.param("width: [32]\nheads: [4, 5]", "width and heads: .* multiple", id="together"),
    pytest.param("width: {low: 16, high: 32}", "width: width 17 is no multiple", id="between"),
    pytest.param("loss: [bce, mse]", "loss: loss 'mse': accepted are bce", id="choice"),
    pytest.param("loss: {low: 0, high: 1}", "loss has no range", id="range-of-words"),
    pytest.param("predictor: [crystal]", "'crystal' is unknown", id="family"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_space_is_one_line_that_names_the_field(text, message, tmp_path):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        make_space(read_space(tmp_path / "space.yaml"))
    assert "\n" not in str(caught.value)


def test_a_field_that_varies_is_not_given_too():
    with pytest.raises(SettingsError, match="'lr' varies and is also given"):
        make_space({"lr": [0.1]}, given={"lr": 0.2})


@pytest.fixture
def sweep(traces, tmp_path):
    """Make the Sweep of a folder in `tmp_path`."""
    pytest.importorskip("optuna")
    from outrider.predictors.trial import Sweep

    def make(name, space=None, **changes):
        space = make_space(
            space or {"lr": {"low": 5e-4, "high": 2e-2, "log": True}, "width": [16, 32]},
            given=SMALL,
        )
        wanted = {"trials": 4, "given": SMALL, "traces": (traces,), "folder": tmp_path / name}
        return Sweep(space=space, **(wanted | changes))

    return make


def _results(document):
    """What does not depend on when and where it was made."""
    return [
        {name: row[name] for name in ("trial", "state", "recall", "options", "recall_by_epoch")}
        for row in document["trials"]
    ]


def _interrupt_at(what):
    def tell(said, done, total):
        if said == what and done:
            raise KeyboardInterrupt

    return tell


def test_an_interrupted_sweep_goes_on_to_the_same_trials(sweep):
    from outrider.predictors.checkpoint import load_predictor
    from outrider.predictors.sweep import Here, run_sweep

    whole = sweep("whole")
    document = run_sweep(whole, executor=Here())
    assert [row["state"] for row in document["trials"]] == ["complete"] * 4
    assert len({json.dumps(row["options"]) for row in document["trials"]}) == 4
    best = max(document["trials"], key=lambda row: row["recall"])
    assert document["best"] == best
    assert (whole.folder / "best").resolve() == (whole.folder / f"trials/{best['trial']:04d}")
    assert load_predictor(whole.folder / "best").name == "hierarchical"

    # In the middle of the second trial's second epoch; then before the last trial; then to the end.
    parts = sweep("parts", trials=3)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(parts, executor=Here(_interrupt_at("trial 1: epoch 2")))
    run_sweep(sweep("parts", trials=3, resume=True), executor=Here())
    resumed = run_sweep(sweep("parts", resume=True), executor=Here())
    assert _results(resumed) == _results(document)
    for number in range(4):
        name = f"trials/{number:04d}/model.safetensors"
        assert (whole.folder / name).read_bytes() == (parts.folder / name).read_bytes()


def test_a_poor_trial_ends_early_and_a_good_one_does_not(sweep):
    """Five trials at a useful rate, then one that learns nothing, then a useful one again."""
    from outrider.predictors.study import open_study, propose
    from outrider.predictors.sweep import Here, run_sweep

    wanted = sweep("S", {"lr": [2e-2, 1e-8], "width": [16]}, trials=7, resume=True)
    wanted.folder.mkdir()
    (wanted.folder / "sweep.json").write_text(json.dumps(wanted.record()))
    study = open_study(wanted.folder)
    for lr in (2e-2, 2e-2, 2e-2, 2e-2, 2e-2, 1e-8, 2e-2):
        study.enqueue_trial({"lr": lr, "width": 16})
        propose(study, wanted.space, seed=0)
    told = []
    document = run_sweep(wanted, executor=Here(), told=told.append)
    states = [row["state"] for row in document["trials"]]
    assert states == [*["complete"] * 5, "pruned", "complete"]
    assert [len(row["recall_by_epoch"]) for row in document["trials"]] == [3, 3, 3, 3, 3, 1, 3]
    assert [row["trial"] for row in told] == list(range(7)) and told[5]["state"] == "pruned"
    pruned = wanted.folder / "trials/0005"
    assert not (pruned / "config.json").exists() and not list(pruned.glob("training-*"))
    # One seed, one result: the same options give the same figure.
    assert len({row["recall"] for row in document["trials"] if row["state"] == "complete"}) == 1


def test_what_a_folder_holds_is_not_overwritten(sweep, tmp_path):
    from outrider.predictors.sweep import Here, run_sweep

    run_sweep(sweep("S", {"lr": [2e-2], "width": [16]}, trials=1), executor=Here())
    with pytest.raises(FolderError, match="holds a sweep; go on with --resume"):
        run_sweep(sweep("S"), executor=Here())
    with pytest.raises(SettingsError, match="was begun with other space"):
        run_sweep(sweep("S", resume=True), executor=Here())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"is not empty \(notes.txt\)"):
        run_sweep(sweep("mine"), executor=Here())


def test_a_torn_line_of_the_journal_is_cut_off(sweep):
    """As a process leaves it that is killed while it writes."""
    from outrider.predictors.sweep import Here, run_sweep

    space = {"lr": [2e-2], "width": [16]}
    run_sweep(sweep("S", space, trials=1), executor=Here())
    with (sweep("S", space).folder / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    document = run_sweep(sweep("S", space, trials=2, resume=True), executor=Here())
    assert [row["state"] for row in document["trials"]] == ["complete"] * 2


def test_a_trial_that_fails_is_told_and_the_others_go_on(sweep, monkeypatch):
    """One that runs out of memory; if all do, that is the sweep's error."""
    from outrider.predictors import trial
    from outrider.predictors.errors import PredictorError
    from outrider.predictors.sweep import Here, run_sweep

    train_into = trial.train_into

    def bounded(run, *arguments, **options):
        if run.settings.width > limit:
            raise MemoryError("no room")
        return train_into(run, *arguments, **options)

    monkeypatch.setattr(trial, "train_into", bounded)
    limit = 16
    document = run_sweep(sweep("S"), executor=Here())
    for row in document["trials"]:
        is_wide = row["options"]["width"] > limit
        assert row["state"] == ("failed" if is_wide else "complete")
        assert row["error"] == ("no room" if is_wide else None)
    assert {row["state"] for row in document["trials"]} == {"failed", "complete"}
    limit = 0
    with pytest.raises(PredictorError, match=r"none of 4 trials gave a figure.*no room"):
        run_sweep(sweep("T"), executor=Here())


def test_what_concerns_all_trials_ends_the_sweep(sweep, tmp_path):
    from outrider.predictors.errors import TrainingDataError
    from outrider.predictors.sweep import Here, run_sweep

    poor = write_drift_traces(tmp_path / "poor", documents=40, hidden_layers=(2, 3)).folder
    given = SMALL | {"predictor": "ensemble"}
    with pytest.raises(TrainingDataError, match="collect with --hidden-states"):
        run_sweep(sweep("S", given=given, traces=(poor,)), executor=Here())
    given = SMALL | {"predictor": "lookahead-corrected"}
    with pytest.raises(SettingsError, match="in the pass only"):
        run_sweep(sweep("T", given=given), executor=Here())
