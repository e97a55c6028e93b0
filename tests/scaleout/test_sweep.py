"""`outrider train --sweep` on a real Ray cluster: the trials of a local sweep."""

import json

import pytest
from drift_traces import write_drift_traces
from typer.testing import CliRunner

from outrider.runtime.cli import app

pytestmark = [
    pytest.mark.ray,
    # Ray's own start-up and shutdown leave sockets and subprocesses to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_one_worker_of_a_cluster_runs_the_trials_of_a_local_sweep(tmp_path, monkeypatch):
    """Options, recall of every epoch, states and weights, an early end among them."""
    pytest.importorskip("optuna")
    # Ray keeps a process's first token, which is that of the clusters of the tests before.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0f" * 32)
    traces = write_drift_traces(tmp_path / "traces").folder
    (tmp_path / "space.yaml").write_text("lr: {low: 1e-6, high: 2e-2, log: true}\nwidth: [16]\n")
    documents = []
    for name, more in (("local", []), ("ray", ["--engine", "ray", "--workers", "1"])):
        words = [
            "train", traces, "--predictor", "hierarchical", "--sweep", tmp_path / "space.yaml",
            "--trials", 9, "--heads", 2, "--clusters", 2, "--epochs", 2, "--batch-size", 64,
            "--num-threads", 1, "--out", tmp_path / name, "--json", *more,
        ]  # fmt: skip
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        documents.append(json.loads(done.stdout.splitlines()[-1]))
    kept = ("trial", "state", "recall", "options", "recall_by_epoch")
    local, ray = ([{name: row[name] for name in kept} for row in d["trials"]] for d in documents)
    assert ray == local
    assert {row["state"] for row in local} == {"complete", "pruned"}
    for row in local:
        file = f"trials/{row['trial']:04d}/model.safetensors"
        assert (tmp_path / "ray" / file).exists() == (row["state"] == "complete")
        if row["state"] == "complete":
            assert (tmp_path / "ray" / file).read_bytes() == (
                tmp_path / "local" / file
            ).read_bytes()
