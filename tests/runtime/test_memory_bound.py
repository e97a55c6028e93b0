"""Memory is really bounded: a model many times its budget runs within it, and a leak is found."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import large_model
import pytest

MIB = 1 << 20
SCRIPT = Path(large_model.__file__).with_name("peak_memory.py")


@dataclass
class Run:
    """A model, what `outrider generate` said of running it, and how much memory grew meanwhile."""

    model: large_model.LargeModel
    slack_bytes: int
    experts: dict
    plain: int
    leaking: int

    @property
    def bound(self) -> int:
        return self.model.dense_bytes + self.experts["budget_bytes"] + self.slack_bytes


# The smaller one's dense weights are larger than the slack, so that holding them twice is found.
SIZES = {
    "256MiB": (
        {"num_layers": 4, "hidden_size": 512, "expert_size": 352, "num_dense_rows": 48_000},
        64 * MIB,
    ),
    "2GiB": ({"num_layers": 8, "hidden_size": 1024, "expert_size": 704}, 300 * MIB),
}


@pytest.fixture(
    scope="module", params=["256MiB", pytest.param("2GiB", marks=pytest.mark.slow, id="2GiB")]
)
def run(request, tmp_path_factory):
    shape, slack_bytes = SIZES[request.param]
    folder = tmp_path_factory.mktemp("large")
    model = large_model.write(folder / "model", num_experts=64, **shape)
    arguments = ["generate", str(model.folder), "--prompt", "the film was the best of films"]
    arguments += ["--expert-memory", "10%", "--max-tokens", "8", "--temperature", "0", "--json"]
    process = subprocess.run(
        [sys.executable, SCRIPT, folder / "peak.json", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )
    shutil.rmtree(model.folder)
    assert process.returncode == 0, process.stderr
    documents = [json.loads(line) for line in process.stdout.splitlines()]
    assert documents[0]["token_ids"] == documents[1]["token_ids"]
    peak = json.loads((folder / "peak.json").read_text())
    return Run(model, slack_bytes, documents[0]["experts"], peak["plain"], peak["leaking"])


def test_a_tenth_of_the_experts_is_what_the_slots_take(run):
    assert run.experts["slots"] == run.model.num_experts // 10
    assert run.experts["budget_bytes"] <= run.model.expert_bytes // 10


def test_far_more_was_read_than_may_stay(run):
    # Without this the tests below would show nothing.
    read = sum(run.experts[phase]["bytes_on_demand"] for phase in ("prefill", "decode"))
    assert read > run.experts["budget_bytes"] + 2 * run.slack_bytes


def test_memory_stays_within_dense_weights_budget_and_slack(run):
    assert run.plain <= run.bound


def test_a_leak_of_what_is_read_breaks_the_bound(run):
    assert run.leaking > run.bound
