"""`outrider evaluate`: replay as the engine does it, misses, rows, leaks, pages, bad input."""

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from drift_traces import SHAPE, WINDOW, split_of_document, write_drift_traces
from typer.testing import CliRunner

from outrider.bench import documents
from outrider.bench.prediction import candidates
from outrider.bench.prediction.evaluate import EvaluateOptions, evaluate
from outrider.bench.prediction.misses import missed_look_ups
from outrider.bench.prediction.replay import BEFORE, IN_PASS, PRE_ATTENTION, WindowReplay
from outrider.bench.prediction.windows import read_windows
from outrider.collect.trace import TraceReader
from outrider.predictors.base import Forecast, family_class
from outrider.predictors.oracle import Oracle
from outrider.runtime.cli import app
from outrider.runtime.errors import InvalidDataError, UsageError

PROMPT = 4


@pytest.fixture(scope="module")
def drift(tmp_path_factory):
    return write_drift_traces(tmp_path_factory.mktemp("drift") / "traces")


@pytest.fixture(scope="module")
def document(drift):
    names = ("random", "frequent", "statistics", "lookahead", "oracle")
    return evaluate(EvaluateOptions((drift.folder,), names))


def rows_of(document, predictor, moment=None):
    return [
        row
        for row in document["rows"]
        if row["predictor"] == predictor and moment in (None, row["moment"])
    ]


def read(drift, **options):
    readers = [TraceReader(drift.folder)]
    chosen = {"hidden_layers": range(SHAPE.num_moe_layers), "prompt_tokens": PROMPT} | options
    return read_windows(readers, **chosen)


class Witness:
    """Writes down every call it gets, and answers in ways the replay has to sort out."""

    def __init__(self):
        self.shape = SHAPE
        self.calls = []
        self.step = 0

    def begin(self, prompt_ids):
        self.calls.append(("begin", prompt_ids.tolist()))
        self.step = 0

    def before_token(self, token_id, horizon):
        self.step += horizon == 1
        self.calls.append(("before", token_id, horizon))
        table = np.full((SHAPE.num_moe_layers, SHAPE.num_experts), horizon / 10, np.float32)
        return Forecast(self.step + horizon - 1, 0, SHAPE.num_moe_layers, table)

    def in_pass(self, layer_idx, router_input):
        self.calls.append(("in_pass", layer_idx, router_input.numpy().copy()))
        last = min(layer_idx + 3, SHAPE.num_moe_layers)
        if layer_idx + 1 >= last:
            return None
        table = np.full((last - layer_idx - 1, SHAPE.num_experts), layer_idx / 10, np.float32)
        return Forecast(self.step, layer_idx + 1, last, table)

    def observe(self, layer_idx, topk_ids, topk_weights, router_input):
        self.calls.append(("observe", layer_idx, topk_ids.tolist(), len(topk_weights)))


def test_calls_come_in_the_engines_order_with_what_was_recorded(drift):
    window = read(drift).windows[0]
    witness = Witness()
    WindowReplay(SHAPE, prompt_tokens=PROMPT).run(witness, window)
    expected = [("begin", window.token_id[:PROMPT].tolist())]
    layers = range(SHAPE.num_moe_layers)
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, WINDOW))]:
        if start:
            expected += [("before", int(window.token_id[start]), h) for h in (1, 2)]
        for layer_idx in layers:
            expected.append(("in_pass", layer_idx))
            ids = window.topk_ids[start:end, layer_idx].tolist()
            expected.append(("observe", layer_idx, ids, end - start))
    calls = [call[:2] if call[0] == "in_pass" else call for call in witness.calls]
    assert calls == expected
    states = [call[2] for call in witness.calls if call[0] == "in_pass" and call[1] == 2]
    np.testing.assert_array_equal(np.concatenate(states), window.hidden[2].numpy())


@pytest.mark.parametrize("moment", [IN_PASS, PRE_ATTENTION])
def test_forecasts_are_kept_under_moment_and_distance(drift, moment):
    window = read(drift).windows[0]
    tables = WindowReplay(SHAPE, prompt_tokens=PROMPT, moment=moment).run(Witness(), window)
    shift = int(moment == PRE_ATTENTION)
    assert set(tables) == {(BEFORE, 1), (BEFORE, 2), (moment, 1 - shift), (moment, 2 - shift)}
    assert (tables[BEFORE, 1] == np.float32(0.1)).all()
    # Nothing spoke two tokens ahead of the first decoded one.
    assert np.isnan(tables[BEFORE, 2][0]).all()
    assert (tables[BEFORE, 2][1:] == np.float32(0.2)).all()
    for distance in (1, 2):
        table = tables[moment, distance - shift]
        for layer_idx in range(SHAPE.num_moe_layers):
            expected = np.nan if layer_idx < distance else np.float32((layer_idx - distance) / 10)
            np.testing.assert_array_equal(
                table[:, layer_idx], np.full_like(table[:, layer_idx], expected)
            )


def test_a_malformed_forecast_is_named(drift):
    class Wrong(Witness):
        def before_token(self, token_id, horizon):
            return replace(super().before_token(token_id, horizon), layer_to=2)

    with pytest.raises(InvalidDataError, match="cannot be judged"):
        WindowReplay(SHAPE, prompt_tokens=PROMPT).run(Wrong(), read(drift).windows[0])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_misses_are_those_of_a_plain_lru(drift, share):
    windows = read(drift).windows
    num_slots = int(share * SHAPE.num_moe_layers * SHAPE.num_experts)
    cache = OrderedDict()

    def touch(keys):
        for key in keys:
            cache.pop(key, None)
            cache[key] = True
        while len(cache) > num_slots:
            cache.popitem(last=False)

    found = missed_look_ups(windows, SHAPE, share=share, prompt_tokens=PROMPT)
    for window, missed in zip(windows, found, strict=True):
        for layer_idx in range(SHAPE.num_moe_layers):
            prompt = window.topk_ids[:PROMPT, layer_idx]
            touch([(layer_idx, int(expert)) for expert in sorted(set(prompt.ravel().tolist()))])
        for step, layers in enumerate(window.topk_ids[PROMPT:].tolist()):
            for layer_idx, ids in enumerate(layers):
                keys = [(layer_idx, expert) for expert in ids]
                assert missed[step, layer_idx].tolist() == [key not in cache for key in keys]
                touch(keys)
    if share == 1.0:
        assert not found[-1].any()


def test_the_oracle_is_perfect_and_chance_is_chance(document):
    for row in rows_of(document, "oracle"):
        for name in ("top1", "top2", "recall_at_k", "recall_at_2k", "exact", "precision"):
            assert row[name] == 1.0, (row["moment"], name)
            assert row["ci"][name] == [1.0, 1.0]
        assert set(row["recall_on_misses"].values()) == {1.0}
        assert row["ece"] < 1e-4 and row["brier_skill"] > 0.9999
    assert {(row["moment"], row["distance"]) for row in rows_of(document, "oracle")} == {
        ("before", 1), ("before", 2), ("in_pass", 1), ("in_pass", 2), ("in_pass", 3)
    }  # fmt: skip
    chance = SHAPE.top_k / SHAPE.num_experts
    for row in rows_of(document, "random"):
        assert row["recall_at_k"] == pytest.approx(chance, abs=0.06)
        assert row["recall_at_2k"] == pytest.approx(2 * chance, abs=0.08)
        assert row["top1"] == pytest.approx(1 / SHAPE.num_experts, abs=0.07)
        low, high = row["ci"]["recall_at_k"]
        assert low <= row["recall_at_k"] <= high
        assert row["precision"] is None, "nothing was forecast as likely"


def test_statistics_have_no_skill_over_themselves(document):
    first, second = rows_of(document, "statistics")
    assert (first["brier_skill"], second["brier_skill"]) == (0.0, 0.0)
    assert first["recall_at_k"] > rows_of(document, "frequent")[0]["recall_at_k"] + 0.1


def test_document_is_what_its_schema_says(document):
    assert documents.check(json.loads(json.dumps(document)), source="here") == "evaluate"


def test_rows_have_every_promised_field(document):
    promised = {
        "predictor", "moment", "distance", "top1", "top2", "recall_at_k", "recall_at_2k", "exact",
        "precision", "recall_on_misses", "ece", "brier_skill", "microseconds", "parameters", "ci",
        "per_layer", "commit", "versions", "device", "model", "fingerprint", "format", "workload",
        "seed",
    }  # fmt: skip
    for row in document["rows"]:
        assert promised <= set(row)
        assert set(row["recall_on_misses"]) == {"10%", "25%", "50%"}
        for name, interval in row["ci"].items():
            pairs = interval.values() if isinstance(interval, dict) else [interval]
            assert all(pair is None or pair[0] <= pair[1] for pair in pairs), name
    assert json.loads(json.dumps(document, allow_nan=False))["rows"] == document["rows"]


def test_in_pass_rows_count_misses_of_layers_out_of_reach(document):
    # Look-ahead says nothing of layer 0, so its misses there count as not foretold.
    for row in rows_of(document, "lookahead", "in_pass"):
        assert [layer["layer_idx"] for layer in row["per_layer"]] == list(
            range(row["distance"], SHAPE.num_moe_layers)
        )
        own = np.mean([layer["recall_on_misses"]["10%"] for layer in row["per_layer"]])
        assert row["recall_on_misses"]["10%"] < own


def test_no_test_document_is_ever_fitted_to(drift, monkeypatch):
    seen = {}
    family = family_class("statistics")
    fit = family.fit.__func__

    def spy(cls, examples, *, validation, settings, progress):
        seen["train"], seen["validation"] = examples, validation
        return fit(cls, examples, validation=validation, settings=settings, progress=progress)

    monkeypatch.setattr(family, "fit", classmethod(spy))
    evaluate(EvaluateOptions((drift.folder,), ("statistics",)))
    for name, wanted in (("train", 0), ("validation", 1)):
        documents = set((seen[name].document_id - np.uint64(1000)).tolist())
        assert documents and {split_of_document(int(number)) for number in documents} == {wanted}
    tested = {int(number) - 1000 for number in read(drift).document_ids}
    assert tested and all(split_of_document(number) == 2 for number in tested)


def test_windows_are_whole_held_out_samples_and_a_limit_spreads(drift):
    held_out = read(drift)
    documents = [n for n in range(60) if split_of_document(n) == 2]
    assert held_out.num_documents == len(documents)
    assert len(held_out.windows) == 2 * len(documents)
    few = read(drift, limit=4)
    assert len(few.windows) == 4
    assert few.num_documents > 2, "spread over documents, not the first few windows"


def test_the_command_writes_table_json_figures_and_page(drift, tmp_path):
    out, picture = tmp_path / "out", tmp_path / "plot.png"
    arguments = ["evaluate", str(drift.folder), "--predictor", "random,lookahead"]
    arguments += ["--predictor", "oracle", "--json", "--out", str(out), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert list(dict.fromkeys(row["predictor"] for row in document["rows"])) == [
        "random", "lookahead", "oracle"
    ]  # fmt: skip
    kept = json.loads((out / "evaluation.json").read_text())
    assert kept["rows"] == document["rows"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    page = (out / "index.html").read_text()
    assert "lookahead, in pass, l+1" in page and page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", ""), "the page needs nothing else"
    result = CliRunner().invoke(app, ["evaluate", str(drift.folder), "--predictor", "random"])
    assert result.exit_code == 0 and "recall@k" in result.stdout


@pytest.mark.parametrize(
    ("predictor", "error", "said"),
    [
        ("clairvoyant", UsageError, "known are .*frequent.*statistics"),
        ("hierarchical", UsageError, "outrider train"),
        ("no/such/folder", ValueError, "no/such/folder"),
    ],
)
def test_unknown_predictors_are_explained(drift, predictor, error, said):
    with pytest.raises(error, match=said):
        evaluate(EvaluateOptions((drift.folder,), (predictor,)))


def test_traces_without_the_states_a_predictor_needs_are_refused(tmp_path):
    traces = write_drift_traces(tmp_path / "T", hidden_layers=(2, 3), documents=40)
    result = CliRunner().invoke(app, ["evaluate", str(traces.folder), "--predictor", "lookahead"])
    assert result.exit_code == 3
    assert "layers 0, 1" in result.output and "--hidden-states all" in result.output
    assert "Traceback" not in result.output


def test_too_few_held_out_windows_are_refused(tmp_path):
    traces = write_drift_traces(tmp_path / "T", documents=10)
    with pytest.raises(InvalidDataError, match=r"2 windows.*collect more"):
        evaluate(EvaluateOptions((traces.folder,), ("random",)))


def test_a_damaged_shard_is_named(tmp_path):
    traces = write_drift_traces(tmp_path / "T", documents=40)
    shard = next((traces.folder / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    result = CliRunner().invoke(app, ["evaluate", str(traces.folder), "--predictor", "random"])
    assert result.exit_code == 3 and shard.name in result.output


def test_a_predictor_of_another_model_is_refused_with_the_difference(drift, tmp_path):
    from outrider.predictors.checkpoint import save_predictor

    maker = candidates.Candidates([TraceReader(drift.folder)])
    tensors, config = maker.fitted("statistics").state()
    other = replace(SHAPE, fingerprint="another")
    save_predictor(tmp_path / "P", family="statistics", shape=other, tensors=tensors, config=config)
    arguments = ["evaluate", str(drift.folder), "--predictor", str(tmp_path / "P")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "fingerprint is 'another'" in result.output and "drift-0" in result.output


def test_the_oracle_without_foresight_says_nothing():
    oracle = Oracle(SHAPE)
    oracle.begin(np.arange(3))
    assert oracle.before_token(1, 1) is None and oracle.in_pass(0, None) is None
