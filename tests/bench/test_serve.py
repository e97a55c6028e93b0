"""`bench serve`: figures by their definitions, and a run against a server that is a double."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import served_double
from served_double import answer

from outrider.bench import documents, serve
from outrider.bench.compare import compare
from outrider.bench.latencies import experts, figures
from outrider.bench.load import Load, Prompt, Taken
from outrider.bench.report.tables import table
from outrider.bench.serve import ServedDifferently, ServeOptions, bench_serve
from outrider.runtime.errors import UsageError
from outrider.runtime.serving.client import Client


def taken(times_s, num_input=3, error=None):
    prompt = Prompt("p", [1] * num_input, len(times_s))
    last = times_s[-1] if times_s else 0.0
    return Taken(prompt, times_s, list(range(len(times_s))), last, error)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = served_double.start(tmp_path_factory.mktemp("s"), max_running=8)
    yield server
    server.kill()


class Alone:
    """Stands for the engine in a process of its own: the double's tokens, at once."""

    def __init__(self, kind, options, *, num_threads):
        self.shift = 0

    def call(self, method, *arguments, kind):
        if method == "encode":
            return [list(text.encode()) for text in arguments[0]]
        prompt_ids, num_tokens = arguments
        tokens = answer(bytes(prompt_ids), num_tokens)
        return {
            "times_s": [0.002 * (place + 1) for place in range(num_tokens)],
            "token_ids": [token + self.shift for token in tokens],
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def doubled(monkeypatch, server):
    @contextmanager
    def started(options):
        yield server.address

    monkeypatch.setattr(serve, "_server", started)
    monkeypatch.setattr(serve, "Worker", Alone)


def test_figures_are_those_of_vllm(server):
    with Client(server.address, timeout_s=120) as client:
        stats = client.stats()
    load = Load(
        (taken([0.1, 0.2, 0.5]), taken([0.3, 0.4]), taken([], error="overloaded: full")),
        2.0, stats, stats,
    )  # fmt: skip
    row = figures([load])
    assert (row["completed"], row["failed"], row["num_prompts"]) == (2, 1, 3)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (6, 5)
    assert (row["request_throughput"], row["output_throughput"]) == (1.0, 2.5)
    assert row["total_token_throughput"] == 5.5
    assert row["mean_ttft_ms"] == pytest.approx(200) == row["median_ttft_ms"]
    assert row["std_ttft_ms"] == pytest.approx(100)
    assert row["p99_ttft_ms"] == pytest.approx(298)
    # (0.5 - 0.1) / 2 and (0.4 - 0.3) / 1; gaps of 100, 300 and 100.
    assert row["mean_tpot_ms"] == pytest.approx(150)
    assert row["median_itl_ms"] == pytest.approx(100)
    assert row["mean_e2el_ms"] == pytest.approx(450)
    assert row["errors"] == ["overloaded: full"]
    nothing = experts([load])
    assert (nothing["lookups"], nothing["hit_rate"], nothing["bytes_per_token"]) == (0, None, 0.0)


def test_bytes_are_counted_a_generated_token(server):
    with Client(server.address, timeout_s=120) as client:
        before = client.stats()
    after = msgspec.structs.replace(
        before,
        generation_tokens_total=before.generation_tokens_total + 10,
        expert_lookups_total={"hit": before.expert_lookups_total["hit"] + 6, "late": 1, "miss": 1},
        expert_transfer_bytes_total={"on_demand": 700, "prefetch": 300},
    )
    found = experts([Load((), 1.0, before, after)])
    assert (found["lookups"], found["hit_rate"], found["late_rate"]) == (8, 0.75, 0.125)
    assert found["bytes_per_token"] == 100


def test_a_run_has_a_row_for_each_level_and_compares_with_the_engine(doubled):
    told = []
    document = bench_serve(
        ServeOptions(clients=(1, 4), requests=2, num_tokens=8, num_idle=5, repetitions=2),
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert documents.check(json.loads(json.dumps(document)), source="this run") == "serve"
    assert [row["max_concurrency"] for row in document["rows"]] == [1, 4]
    (shown,) = table("serve", document)
    assert [row[0] for row in shown.rows] == ["1", "4"]
    assert compare(document, document, kinds=("serve", "serve"))["compared"] == 2
    for row in document["rows"]:
        assert row["failed"] == 0 and row["completed"] == 2 * 2 * row["max_concurrency"]
        assert row["total_output_tokens"] == 8 * row["completed"]
        assert row["same_tokens_as_alone"] == 1.0
        assert row["ratio"]["to"] == 1 and row["commit"] is not None
    assert document["rows"][0]["ratio"]["median"] == 1.0
    # The double's pass takes 2 ms however many share it: four clients get far more than one.
    assert document["rows"][1]["ratio"]["median"] > 1.5
    assert document["server"]["tpot_ratio"]["count"] == 2 * 8
    assert document["idle_clients"]["clients"] == 5
    assert told[-1][0] == told[-1][1]


def test_other_tokens_than_the_engines_stop_it(doubled, monkeypatch):
    monkeypatch.setattr(Alone, "__enter__", lambda self: setattr(self, "shift", 1) or self)
    with pytest.raises(ServedDifferently, match="not the engine's"):
        bench_serve(ServeOptions(clients=(1,), requests=1, num_tokens=4, repetitions=1))


@pytest.mark.parametrize(
    "fields", [{"clients": ()}, {"clients": (0,)}, {"num_tokens": 1}, {"repetitions": 0}]
)
def test_options_that_cannot_be_are_refused(fields):
    with pytest.raises(UsageError):
        bench_serve(ServeOptions(**fields))


@pytest.mark.slow
def test_the_command_measures_the_built_in_model():
    done = subprocess.run(
        [
            Path(sys.executable).with_name("outrider"), "bench", "serve", "--clients", "1,2",
            "--requests", "1", "--tokens", "8", "--repetitions", "1", "--json",
        ],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["max_concurrency"] for row in json.loads(done.stdout)["rows"]] == [1, 2]
