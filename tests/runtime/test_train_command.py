"""`outrider train`: one command from traces to a predictor, and a sentence for every bad input."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from drift_traces import SHAPE, write_drift_traces
from typer.testing import CliRunner

from outrider.predictors.checkpoint import load_predictor
from outrider.runtime.cli import app

SMALL = ("--width", "16", "--heads", "2", "--clusters", "2", "--epochs", "2", "--batch-size", "64")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces").folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_one_command_makes_what_evaluate_and_generate_take(traces, tmp_path):
    out = tmp_path / "P"
    result = run(traces, "--predictor", "hierarchical", "--out", out, *SMALL, "--json")
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["family"] == "hierarchical" and document["training"]["train_tokens"] > 500
    assert document["training"]["settings"]["width"] == 16
    loaded = load_predictor(out, SHAPE)
    assert loaded.name == "hierarchical"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"epoch", "loss", "validation_loss", "recall_1"} <= set(lines[0])
    if find_spec("matplotlib") is None:  # the extra `plots` is not installed at the floors
        assert document["curves"] is None and "outrider[plots]" in result.stderr
    else:
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert document["curves"] == str(out / "curves.png")
    evaluated = CliRunner().invoke(
        app, ["evaluate", str(traces), "--predictor", f"statistics,{out}", "--json"]
    )
    assert evaluated.exit_code == 0, evaluated.output
    rows = json.loads(evaluated.stdout.splitlines()[-1])["rows"]
    assert {row["predictor"].split()[0] for row in rows} == {"statistics", "hierarchical"}


def test_the_summary_says_what_came_of_it_and_what_comes_next(traces, tmp_path):
    result = run(traces, "--predictor", "statistics", "--out", tmp_path / "P")
    assert "learned from" in result.stdout and "horizon 1: recall@k" in result.stdout
    assert f"--predictor statistics,{tmp_path / 'P'}" in result.stdout
    again = run(traces, "--predictor", "statistics", "--out", tmp_path / "P", "--resume")
    assert "learned from" in again.stdout, "resuming what has ended says what it was"


def test_a_sweep_prints_its_trials_and_leaves_the_best_where_evaluate_takes_it(traces, tmp_path):
    pytest.importorskip("optuna")
    space, out = tmp_path / "space.yaml", tmp_path / "S"
    space.write_text("lr: {low: 1e-3, high: 2e-2, log: true}\nclusters: [2, 3]\n")
    words = [traces, "--predictor", "hierarchical", "--sweep", space, "--out", out, "--trials"]
    words = [*words, 2, "--width", 16, "--heads", 2, "--epochs", 2, "--batch-size", 64]
    result = run(*words)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["trial", "state", "recall@k", "epochs", "seconds", "lr", "clusters"]
    assert len(lines) == 5 and "best" in lines[1] and f"statistics,{out}/best" in lines[-1]
    assert result.stderr.count("complete: recall@k ") == 2
    again = run(*words, "--resume", "--json")
    document = json.loads(again.stdout.splitlines()[-1])
    assert [row["trial"] for row in document["trials"]] == [0, 1]
    best = document["best"]
    assert best["recall"] == max(row["recall"] for row in document["trials"])
    predictor = load_predictor(out / "best", SHAPE)
    assert predictor.name == "hierarchical"
    config = json.loads((out / "best" / "config.json").read_text())
    assert config["training"]["settings"]["lr"] == best["options"]["lr"]
    assert config["metrics"]["validation_recall_at_k_1"] == best["recall"]
    if find_spec("matplotlib") is not None:
        assert document["figure"] == str(out / "trials.png")
        assert (out / "trials.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_in_processes_of_its_own(traces, tmp_path):
    pytest.importorskip("optuna")
    space, out = tmp_path / "space.yaml", tmp_path / "S"
    space.write_text("predictor: [statistics, cluster]\nclusters: [2, 3]\n")
    words = [traces, "--sweep", space, "--out", out, "--trials", 3, "--workers", 2, "--json"]
    document = json.loads(run(*words).stdout.splitlines()[-1])
    assert [row["state"] for row in document["trials"]] == ["complete"] * 3
    for row in document["trials"]:
        assert load_predictor(Path(row["folder"]), SHAPE).name == row["options"]["predictor"]


SWEEP = ["--predictor", "statistics", "--out", "P", "--sweep"]
BAD_SWEEPS = [
    pytest.param("lr: [-1]", ["--trials", "2"], "sweep: lr: lr is -1.0; accepted", id="space"),
    pytest.param("context: [2]", [], "give --trials N", id="no-trials"),
    pytest.param("context: [2]", ["--trials", "2", "--address", "a:1"], "add --engine ray",
                 id="address"),
    pytest.param("context: [2]", ["--trials", "2", "--engine", "slurm"], "accepted are local, ray",
                 id="engine"),
    pytest.param("context: [2]", ["--trials", "2", "--context", "3"], "is also given", id="twice"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "more", "message"), BAD_SWEEPS)
def test_a_bad_sweep_is_one_line(space, more, message, traces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(space)
    result = run(traces, *SWEEP, "space.yaml", *more, code=2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "P").exists()


def test_options_of_sweeps_without_one_and_sweeps_without_their_library(
    traces, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run(traces, "--predictor", "statistics", "--out", "P", "--trials", 3, code=2)
    assert "--trials is for sweeps; add --sweep space.yaml" in result.stderr
    (tmp_path / "space.yaml").write_text("context: [2, 3]")
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = run(traces, *SWEEP, "space.yaml", "--trials", 2, code=1)
    assert result.stderr == "outrider: this needs optuna: pip install 'outrider[sweep]'\n"
    assert not (tmp_path / "P").exists()


BAD = [
    pytest.param([], 2, "no predictor named: give --predictor", id="no-predictor"),
    pytest.param(["--predictor", "statistics"], 2, "give --out DIR", id="no-out"),
    pytest.param(
        ["--predictor", "crystal", "--out", "P"],
        2,
        "those that are trained: attention",
        id="unknown",
    ),
    pytest.param(
        ["--predictor", "lookahead", "--out", "P"], 2, "'lookahead' is not trained", id="untrained"
    ),
    pytest.param(
        ["--predictor", "statistics", "--out", "P", "--preset", "huge"],
        2,
        "known ones: small, large, rtx3090, a6000",
        id="preset",
    ),
    pytest.param(
        ["--predictor", "statistics", "--out", "P", "--lr", "-1"],
        2,
        "lr is -1.0; accepted is",
        id="range",
    ),
    pytest.param(
        ["--predictor", "statistics", "--out", "P", "--lr", "nan"], 2, "lr is nan", id="nan"
    ),
    pytest.param(
        ["--predictor", "statistics", "--out", "P", "--loss", "mse"],
        2,
        "accepted are bce, softmax, focal",
        id="loss",
    ),
    pytest.param(
        ["--predictor", "hierarchical", "--out", "P", "--width", "30"],
        2,
        "no multiple of heads",
        id="heads",
    ),
    pytest.param(
        ["--predictor", "statistics", "--out", "P", "--horizon", "3"],
        2,
        "accepted is 1 to 2",
        id="horizon",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_a_bad_option_is_one_line(arguments, code, message, traces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(traces, *arguments, code=code)
    assert message in result.stderr
    assert not (tmp_path / "P").exists(), "nothing is made for what is refused"


def test_traces_that_are_none_or_lack_states(traces, tmp_path):
    result = run(tmp_path, "--predictor", "statistics", "--out", tmp_path / "P", code=3)
    assert str(tmp_path) in result.stderr
    poor = write_drift_traces(tmp_path / "traces", documents=40, hidden_layers=(2, 3)).folder
    result = run(poor, "--predictor", "ensemble", "--out", tmp_path / "Q", code=3)
    assert "collect with --hidden-states" in result.stderr


def test_a_folder_in_use_is_left_alone(traces, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run(traces, "--predictor", "statistics", "--out", tmp_path, code=1)
    assert "is not empty (notes.txt)" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]
