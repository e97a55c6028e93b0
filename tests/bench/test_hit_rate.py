"""`bench hit-rate` and `bench simulate` over traces of a model with known routing."""

import json
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drift_traces import SHAPE, write_drift_traces
from typer.testing import CliRunner

from outrider.bench import documents, hit_rate, simulate
from outrider.bench.curves import plot_hit_rates, series
from outrider.bench.devices import find_device
from outrider.bench.fit import Fit, bench_fit
from outrider.bench.forecaster import Source
from outrider.bench.hit_rate import HitRateOptions, bench_hit_rate, warm_from
from outrider.bench.model_shapes import find_geometry, geometry_for, model_shapes
from outrider.bench.passes import CollectingPass
from outrider.bench.simulate import SimulateOptions, bench_simulate
from outrider.runtime.cli import app
from outrider.runtime.errors import InsufficientMemoryError, InvalidDataError, UsageError
from outrider.runtime.experts.eviction import DEFAULT_EVICTION

POLICIES = ("lru", "lfu", "layer-lru", "layer-lfu", "layer-ucp", "static", "forecast", "belady")
PREDICTORS = ("random", "statistics", "lookahead", "oracle")
BUDGETS = ("12%", "50%")


class InlinePool:
    """An executor whose work is done when it is given; no processes to start."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces")


@pytest.fixture(autouse=True)
def in_process(monkeypatch, tmp_path):
    @contextmanager
    def workspace(workers, cluster=None, scratch=None):
        folder = tmp_path / "workspace"
        folder.mkdir()
        yield folder, InlinePool()
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()

    monkeypatch.setattr(hit_rate, "workspace", workspace)
    monkeypatch.setattr(simulate, "workspace", workspace)


def options(drift, **fields) -> HitRateOptions:
    source = Source((drift.folder,), "all", 420, 4, 0)
    values = {
        "source": source,
        "device": find_device("cpu"),
        "geometry": geometry_for(SHAPE),
        "format": "bf16",
        "policies": POLICIES,
        "predictors": PREDICTORS,
        "budgets": BUDGETS,
    }
    return HitRateOptions(**(values | fields))


def silent(what: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def document(drift, tmp_path_factory):
    patch = pytest.MonkeyPatch()

    @contextmanager
    def workspace(workers, cluster=None, scratch=None):
        yield tmp_path_factory.mktemp("workspace"), InlinePool()

    patch.setattr(hit_rate, "workspace", workspace)
    try:
        return bench_hit_rate(options(drift), progress=silent)
    finally:
        patch.undo()


def test_document_is_what_its_schema_says(document):
    assert documents.check(json.loads(json.dumps(document)), source="here") == "hit-rate"
    assert len(document["rows"]) == 2 * len(BUDGETS) * (7 + 4 + 4)


def test_belady_is_the_bound_of_every_demand_only_row(document):
    for row in document["rows"]:
        if row["prefetch"] == "off":
            (bound,) = [
                one for one in document["rows"]
                if one["policy"] == "belady"
                and (one["budget"], one["cache"]) == (row["budget"], row["cache"])
            ]  # fmt: skip
            assert row["hit_rate"] <= bound["hit_rate"]
            assert row["slots"] == bound["slots"]


def test_oracle_is_the_bound_of_every_prefetching_row(document):
    rows = [row for row in document["rows"] if row["prefetch"] == "on"]
    for row in rows:
        (oracle,) = [
            one for one in rows
            if one["predictor"] == "oracle"
            and (one["budget"], one["cache"]) == (row["budget"], row["cache"])
        ]  # fmt: skip
        assert oracle["recall_on_misses"] == 1.0 and oracle["recall_at_k"] == 1.0
        assert row["recall_on_misses"] <= 1.0
        assert oracle["hit_rate"] >= row["hit_rate"] - 1e-12
        assert oracle["stall_s_per_token"] <= row["stall_s_per_token"] + 1e-12


def test_rates_and_bytes_reconcile(document):
    for row in document["rows"]:
        assert row["hit_rate"] + row["late_rate"] + row["miss_rate"] == pytest.approx(1.0)
        moved = row["on_demand_bytes_per_token"] + row["prefetched_bytes_per_token"]
        assert row["bytes_per_token"] == pytest.approx(moved)
        assert row["wasted_bytes_per_token"] <= row["prefetched_bytes_per_token"] + 1e-9
        look_ups = SHAPE.num_moe_layers * SHAPE.top_k
        if row["prefetch"] == "off":
            missed = row["miss_rate"] * look_ups * row["expert_bytes"]
            assert row["bytes_per_token"] == pytest.approx(missed)
        low, high = row["ci"]["hit_rate"] or (row["hit_rate"],) * 2
        assert low <= row["hit_rate"] + 1e-9 and row["hit_rate"] <= high + 1e-9


def test_two_runs_are_identical(drift, document):
    again = bench_hit_rate(options(drift), progress=silent)
    for one in (document, again):
        for row in one["rows"]:
            row.pop("date", None)
    assert again["rows"] == document["rows"]
    assert again["settings"] == document["settings"]


def test_faster_link_changes_times_and_not_demand_only_hits(drift):
    wanted = options(drift, policies=("layer-lfu",), predictors=(), links=(1e8, 1e9))
    rows = bench_hit_rate(wanted, progress=silent)["rows"]
    for slow, fast in zip(rows, rows, strict=True):
        if slow["link_bytes_per_s"] < fast["link_bytes_per_s"]:
            assert slow["hit_rate"] == fast["hit_rate"]
            assert slow["stall_s_per_token"] > fast["stall_s_per_token"]
    assert {row["link_bytes_per_s"] for row in rows} == {1e8, 1e9}


def test_warm_rows_begin_after_a_quarter_at_the_latest():
    recorded = type("R", (), {"offsets": np.arange(0, 1001, 100)})()
    assert warm_from(recorded, 10**6, 4) == 3
    assert warm_from(recorded, 50, 4) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": ("mru",)}, "mru"),
        ({"eviction": "belady"}, "demand-only"),
        ({"prefetch": "perhaps"}, "perhaps"),
        ({"budgets": ("0%",)}, "more than nothing"),
        ({"predictors": ("clairvoyant",)}, "unknown"),
    ],
)
def test_wrong_options_are_refused(drift, fields, said):
    with pytest.raises(UsageError, match=said):
        bench_hit_rate(options(drift, **fields), progress=silent)


def test_too_few_tokens_are_refused(drift):
    few = replace(options(drift).source, max_tokens=40)
    with pytest.raises(UsageError, match="at least 256"):
        bench_hit_rate(options(drift, source=few), progress=silent)


def test_curves_have_belady_above(document, tmp_path):
    curves = series(document)
    assert all(
        high >= low
        for name, points in curves.items()
        if " + " not in name
        for (_, low), (_, high) in zip(points, curves["belady"], strict=True)
    )
    plot_hit_rates(document, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


# ANCHORS section 5: card, format -> share of DeepSeek-MoE-16B's experts that fits.
RESIDENT = {
    ("laptop-8gb", "bf16"): 0.12,
    ("laptop-8gb", "int8"): 0.23,
    ("laptop-12gb", "bf16"): 0.26,
    ("laptop-12gb", "int8"): 0.51,
    ("rtx3090", "bf16"): 0.69,
    ("rtx3090", "int8"): 1.0,
}


@pytest.mark.parametrize(("card", "fmt"), RESIDENT)
def test_room_on_a_card_is_the_anchors(card, fmt):
    fit = Fit(find_device(card), model_shapes()["deepseek-moe-16b"], fmt)
    assert fit.share == pytest.approx(RESIDENT[card, fmt], abs=0.011)


@pytest.mark.parametrize(
    ("hit_rate", "overlap", "serial"),
    [(0.0, 8.9, 8.5), (0.5, 17.8, 16.2), (0.7, 29.7, 25.5), (0.9, 89.2, 59.5), (0.99, 179, 149)],
)
def test_bounds_are_the_anchors(hit_rate, overlap, serial):
    card = find_device("rtx3090")
    card = type(card)(**{name: getattr(card, name) for name in card.__struct_fields__}
                      | {"link_gb_per_s": 25.0})  # fmt: skip
    fit = Fit(card, model_shapes()["deepseek-moe-16b"], "bf16")
    assert fit.bound(hit_rate) == pytest.approx(overlap, rel=0.01)
    assert fit.serial(hit_rate) == pytest.approx(serial, rel=0.01)


def test_a_collecting_pass_by_hand():
    """DeepSeek-MoE-16B in bf16 on a card that holds it, and on one that brings half of it."""
    shape = model_shapes()["deepseek-moe-16b"]
    experts = 27 * 64 * 3 * 2048 * 1408
    rest = shape.dense_parameters - 2048 * 102400  # the embedding is looked up, not read
    a100 = CollectingPass(Fit(find_device("a100-80"), shape, "bf16"))
    assert a100.touched == pytest.approx(1.0) and a100.link_s == 0.0
    assert a100.device_s == pytest.approx(2 * (experts + rest) / 1935e9)
    overhead_s = a100.overhead_s
    assert a100.serial == pytest.approx(3600 * 8 / (a100.device_s + overhead_s))
    assert a100.bound == pytest.approx(3600 * 8 / a100.device_s)

    card = Fit(find_device("rtx3090"), shape, "bf16")
    half = CollectingPass(card)
    assert half.link_s == pytest.approx((1.0 - card.share) * 2 * experts / 25.3e9)
    assert half.link_s > half.device_s and half.bound == pytest.approx(3600 * 8 / half.link_s)
    # Many more tokens in a pass: arithmetic takes longer than reading.
    large = CollectingPass(Fit(find_device("a100-80"), shape, "bf16"), traces=1024)
    active = rest + 27 * 6 * 3 * 2048 * 1408
    assert large.device_s == pytest.approx(2 * active * 1024 * 64 / 312e12)
    # One token touches its own experts only.
    assert CollectingPass(card, traces=1, tokens=1).touched == pytest.approx(6 / 64)


def test_every_device_figure_has_a_source():
    from outrider.bench.devices import devices

    wanted = {"rtx3090", "rtx4090", "a6000", "a100-40", "a100-80", "h100", "laptop-8gb",
              "laptop-12gb", "cpu"}  # fmt: skip
    assert wanted <= set(devices())
    for device in devices().values():
        figures = set(device.__struct_fields__) - {"title", "memory_gib", "source"}
        assert figures == set(device.source) and all(device.source.values())


def test_shapes_are_those_of_the_published_models():
    billions = {"deepseek-moe-16b": 16.4, "qwen1.5-moe": 14.3, "mixtral-8x7b": 46.7,
                "olmoe-1b-7b": 6.9, "qwen3-30b-a3b": 30.5, "gpt-oss-20b": 20.9,
                "deepseek-v2-lite": 15.7}  # fmt: skip
    for name, wanted in billions.items():
        shape = model_shapes()[name]
        experts = shape.moe_layers * shape.num_experts * shape.expert_parameters
        assert (experts + shape.dense_parameters) / 1e9 == pytest.approx(wanted, rel=0.01), name


def test_fit_needs_a_config_alone(tmp_path):
    nano = Path(__file__).parents[2] / "runtime/models/nano/config.json"
    (tmp_path / "config.json").write_bytes(nano.read_bytes())
    document = bench_fit(find_geometry(str(tmp_path)), [find_device("rtx3090")])
    assert documents.check(json.loads(json.dumps(document)), source="here") == "fit"
    assert [row["resident_share"] for row in document["rows"]] == [1.0, 1.0, 1.0]
    assert document["rows"][0]["experts"] == 8 * 64


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hidden_size": 1}', '{"hidden_size": -4}'])
def test_config_of_no_mixture_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(InvalidDataError, match=r"config\.json"):
        find_geometry(str(file))


def test_simulation_says_so_and_has_one_bound_a_budget(drift):
    wanted = options(
        drift,
        geometry=model_shapes()["deepseek-moe-16b"],
        device=find_device("laptop-8gb"),
        policies=("layer-lfu", "belady"),
        predictors=("oracle",),
        budgets=("auto", "50%"),
    )
    document = bench_simulate(SimulateOptions(wanted), progress=silent)
    assert documents.check(json.loads(json.dumps(document)), source="here") == "simulate"
    assert "floor(l * L / L')" in document["settings"]["mapping"]
    fit = document["fit"]
    for row in document["rows"]:
        assert row["simulated"] is True and row["policy"] in (
            DEFAULT_EVICTION,
            "layer-lfu",
            "belady",
        )
        assert row["experts"] == 27 * SHAPE.num_experts
        # As many bytes a token as the target moves, whatever top-k was recorded.
        look_ups = 27 * SHAPE.top_k
        assert row["expert_bytes"] * look_ups == pytest.approx(
            fit["routed_bytes_per_token"], rel=1e-3
        )
    for cache in ("warm", "cold"):
        bounds = {
            (row["budget"], row["roofline_tokens_per_second"])
            for row in document["rows"]
            if row["cache"] == cache
        }
        assert len(bounds) == 2
    assert min(row["slots"] / row["experts"] for row in document["rows"]) == pytest.approx(
        fit["resident_share"], abs=0.01
    )


def test_same_shape_is_not_mapped(drift):
    wanted = options(drift, policies=("layer-lfu",), predictors=(), budgets=("25%",))
    document = bench_simulate(SimulateOptions(wanted), progress=silent)
    plain = bench_hit_rate(wanted, progress=silent)
    assert document["settings"]["mapping"] is None
    assert [row["hit_rate"] for row in document["rows"]] == [
        row["hit_rate"] for row in plain["rows"]
    ]


def test_model_that_does_not_run_is_refused_with_sizes(drift):
    wanted = options(
        drift, geometry=model_shapes()["mixtral-8x7b"], device=find_device("laptop-8gb"),
        budgets=("auto",), format="fp32",
    )  # fmt: skip
    tight = SimulateOptions(wanted, context_tokens=10**6)
    with pytest.raises(InsufficientMemoryError, match="does not run on"):
        bench_simulate(tight, progress=silent)


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_command_lines(drift, tmp_path):
    common = ["--split", "all", "--tokens", "390", "--predictors", "oracle", "--json"]
    found = run("hit-rate", str(drift.folder), "--budgets", "25%", *common)
    assert found.exit_code == 0, found.output
    assert documents.check(json.loads(found.stdout.splitlines()[-1]), source="cli") == "hit-rate"
    found = run("simulate", str(drift.folder), "--device", "laptop-8gb", *common)
    assert found.exit_code == 0, found.output
    assert documents.check(json.loads(found.stdout.splitlines()[-1]), source="cli") == "simulate"
    lines = json.loads(found.stdout.splitlines()[-1])["timelines"]
    assert len(lines) == 1 and lines[0]["seconds"] > 0.0
    shown = run("simulate", str(drift.folder), "--device", "laptop-8gb", *common[:-1])
    assert "SIMULATED" in shown.stdout and "NVIDIA RTX 4060" in shown.stdout
    fits = run("simulate", "--fit", "qwen3-30b-a3b")
    assert fits.exit_code == 0 and "SIMULATED" in fits.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["simulate", "--device", "rtx9090"], 2, "known ones"),
        (["simulate", "--model-shape", "nothing"], 2, "known one"),
        (["simulate", "--fit", "nothing"], 2, "config.json"),
        (["hit-rate", "/nowhere"], 3, "/nowhere"),
        (["hit-rate", "--device", "cpu", "--link", "fast"], 2, "25GB/s"),
    ],
)
def test_wrong_command_lines(arguments, code, said):
    found = run(*arguments)
    assert found.exit_code == code and said in found.output and "Traceback" not in found.output
