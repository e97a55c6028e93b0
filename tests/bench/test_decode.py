"""Arms side by side: real processes on a tiny model, and a wrong arm that must be found out."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from families import make_checkpoint
from typer.testing import CliRunner

from outrider.bench import decode as bench
from outrider.bench import documents
from outrider.bench.arm import EngineArm
from outrider.bench.decode import DecodeOptions, MismatchError, bench_decode
from outrider.bench.records import Bandwidths, External, Measurement, Passage, Recording
from outrider.bench.timeline import write_trace
from outrider.bench.worker import Worker, WorkerError, _error
from outrider.bench.workload import BUILT_IN, built_in_texts, make_passages, read_texts
from outrider.kernels import native
from outrider.runtime import memory
from outrider.runtime.cli import app
from outrider.runtime.errors import InvalidDataError, OutriderError, UsageError
from outrider.runtime.experts.arithmetic import ModuleArithmetic
from outrider.runtime.experts.controller import GainController

ROW_FIELDS = [
    "arm", "format", "budget", "tokens_per_second", "spread", "ttft_s", "bytes_per_token",
    "hit_rate", "late_rate", "stall_s_per_token", "roofline_tokens_per_second", "roofline_share",
    "rss_peak_bytes", "outside_products_share",
]  # fmt: skip
DOUBT_FIELDS = [
    "commit", "versions", "device", "model", "fingerprint", "workload", "seed", "cache",
    "repetitions", "date",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "deepseek")


class InProcess:
    """A worker without a process: same calls, in order, on an arm in this one."""

    def __init__(
        self, kind: str, options: dict[str, Any], *, num_threads: int | None, fence: Any = None
    ) -> None:
        self.arm = EngineArm(**options) if kind == "engine" else None
        self.replies: list[Any] = []

    def ask(self, method: str, *arguments: Any) -> None:
        if self.arm is None:
            self.replies.append(Bandwidths(10e9, 1e9, "direct"))
        else:
            self.replies.append(getattr(self.arm, method)(*arguments))

    def answer(self, kind: Any) -> Any:
        return self.replies.pop(0)

    def call(self, method: str, *arguments: Any, kind: Any) -> Any:
        self.ask(method, *arguments)
        return self.answer(kind)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.arm is not None:
            self.arm.close()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", InProcess)
    # Arms in one process share what each would take for itself: see test_room.
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)


def options(model: Path, **fields: Any) -> DecodeOptions:
    values = {"repetitions": 2, "num_tokens": 6, "prompt_tokens": 4, "num_passages": 2} | fields
    return DecodeOptions(model=str(model), **values)


def test_rows_carry_the_promised_fields_and_add_up(tiny: Path, in_process: None) -> None:
    seen: list[tuple[str, int, int]] = []
    document = bench_decode(
        options(tiny, budgets=("25%", "50%")), progress=lambda *told: seen.append(told)
    )
    rows = document["rows"]
    assert [(row["budget"], row["cache"], row["arm"]) for row in rows] == [
        ("all" if arm == "resident" else budget, cache, arm)
        for budget in ("25%", "50%")
        for cache in ("warm", "cold")
        for arm in ("resident", "on-demand", "prefetch")
    ]
    assert documents.check(json.loads(json.dumps(document)), source="here") == "decode"
    for row in rows:
        assert list(row)[: len(ROW_FIELDS)] == ROW_FIELDS
        assert all(field in row for field in DOUBT_FIELDS)
        assert row["spread"]["low"] <= row["tokens_per_second"] <= row["spread"]["high"]
        assert row["identical_logits"]
        if native.is_available():
            assert 0 < row["outside_products_share"] < 1
        else:
            assert row["outside_products_share"] is None
        traffic = row["traffic"]
        # 2 repetitions of 2 passages, 5 decode steps each, 2 MoE layers, top 3.
        assert traffic["lookups"] == 2 * 2 * 5 * 2 * 3
        moved = traffic["bytes_on_demand"] + traffic["bytes_prefetched"]
        assert row["bytes_per_token"] == pytest.approx(moved / 20)
        if row["arm"] == "resident":
            assert row["hit_rate"] == 1.0 and moved == 0 and row["slots"] == 24
            assert row["lru_missed_bytes_per_token"] == 0
        else:
            assert row["slots"] == (6 if row["budget"] == "25%" else 12)
            assert 0 < row["lru_missed_bytes_per_token"] <= 6 * row["expert_bytes"]
        if row["arm"] == "on-demand":
            assert row["ratio"]["median"] == 1.0 and traffic["prefetch_issued"] == 0
    assert seen[-1][1] == seen[-1][2]


def test_eager_experts_are_held_to_the_kernels_whatever_the_order(
    tiny: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    honest = ModuleArithmetic.outputs

    def outputs(self: ModuleArithmetic, *arguments: Any, **named: Any) -> None:
        computed.append(len(named["slots"]))
        honest(self, *arguments, **named)

    monkeypatch.setattr(ModuleArithmetic, "outputs", outputs)
    wanted = options(tiny, arms=("eager", "on-demand", "resident"), is_cold=False)
    rows = {row["arm"]: row for row in bench_decode(wanted)["rows"]}
    assert computed, "eager experts went through PyTorch"
    assert list(rows) == ["eager", "on-demand", "resident"]
    assert rows["eager"]["hit_rate"] == 1.0 and rows["eager"]["token_agreement"] == 1.0
    assert rows["on-demand"]["slots"] == 6

    monkeypatch.setattr(ModuleArithmetic, "outputs", lambda self, *_, **named: named["out"].zero_())
    with pytest.raises(MismatchError, match="agrees with 'on-demand'"):
        bench_decode(wanted)


def test_active_bytes_are_what_one_token_reads(tiny: Path) -> None:
    arm = EngineArm(model=str(tiny), options={"expert_memory": "all", "prefetch": "off"})
    subject = arm.load()
    arm.close()
    hidden, inner, dense, vocabulary = 64, 32, 96, 320
    attention, norms = 4 * hidden * hidden, 2 * hidden
    moe = 12 * hidden + 3 * hidden * (2 * inner)  # gate and shared experts
    weights = 3 * (attention + norms) + 3 * hidden * dense + 2 * moe + hidden
    weights += vocabulary * hidden + hidden  # head, and one row of the embeddings
    expert = 3 * hidden * inner * 4
    assert subject.expert_bytes == expert
    rotary_frequencies = 64
    assert 0 <= subject.active_bytes - (4 * weights + 2 * 3 * expert) <= rotary_frequencies


def test_active_bytes_are_known_with_a_quantised_head(tiny: Path) -> None:
    options = {"expert_memory": "all", "prefetch": "off"}
    sizes = []
    for dense_format in ("same", "int8"):
        arm = EngineArm(model=str(tiny), options={**options, "dense_format": dense_format})
        sizes.append(arm.load().dense_bytes)
        arm.close()
    assert sizes[1] < sizes[0] / 2


def test_cold_runs_begin_with_empty_slots_and_warm_ones_do_not(
    tiny: Path, in_process: None
) -> None:
    document = bench_decode(options(tiny, budgets=("100%",), arms=("on-demand",)))
    warm, cold = document["rows"]
    assert warm["traffic"]["misses"] == 0
    assert cold["traffic"]["misses"] > 0


def test_an_arm_with_other_tokens_stops_the_benchmark(
    tiny: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EngineArm.run

    def run(self: EngineArm, passages: list[Passage]) -> Any:
        measurement = honest(self, passages)
        if self._config.prefetch == "auto":
            measurement.token_ids[1][3] += 1
        return measurement

    monkeypatch.setattr(EngineArm, "run", run)
    with pytest.raises(MismatchError, match=r"'prefetch' .* position 3"):
        bench_decode(options(tiny))


def test_the_command_runs_arms_in_processes_and_ends_with_json(tiny: Path, tmp_path: Path) -> None:
    """The whole command once, with the figure."""
    figure = tmp_path / "decode.png"
    arguments = ["bench", "decode", str(tiny), "--arms", "prefetch", "--warm"]
    arguments += ["--tokens", "6", "--prompt-tokens", "4", "--repetitions", "1", "--threads", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(figure)])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    arms = [(row["arm"], row["cache"], row["threads"]) for row in document["rows"]]
    assert arms == [("prefetch", "warm", 1)]
    assert all(row["rss_peak_bytes"] > 50 << 20 for row in document["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_worker_hands_on_errors_and_says_when_it_is_gone() -> None:
    with Worker("probe", {}, num_threads=1) as worker:
        with pytest.raises(WorkerError, match="unknown method 'close'"):
            worker.call("close", kind=dict)
        worker._process.kill()
        with pytest.raises(WorkerError, match="signal"):
            worker.call("measure", [], 0, kind=dict)
    reply = {"error": "InvalidDataError", "message": "shard 3 is missing"}
    assert isinstance(_error(reply), InvalidDataError)
    assert isinstance(_error({"error": "Unheard", "message": "x"}), WorkerError)


def test_the_oracle_is_told_of_each_passage_what_will_be_asked_for(
    tiny: Path, in_process: None
) -> None:
    arms = ("on-demand", "oracle")
    settings = {"budgets": ("50%",), "engine": {"prefetch": "on"}, "is_cold": True}
    on_demand, oracle = bench_decode(options(tiny, arms=arms, **settings))["rows"]
    assert oracle["predictor"] == "frequent" and oracle["identical_logits"]
    traffic = oracle["traffic"]
    assert traffic["prefetch_issued"] > 0
    assert traffic["prefetch_wasted"] == 0, "what was foretold was used"
    assert traffic["misses"] < on_demand["traffic"]["misses"]


def test_nothing_is_learned_from_an_oracle_before_it_has_been_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` once judged it by the run in which it knew nothing, and did not ask again for long."""
    steps: list[float] = []
    learn = GainController.end_step

    def counted(controller: GainController, **measured: Any) -> None:
        steps.append(measured["num_absent"])
        learn(controller, **measured)

    monkeypatch.setattr(GainController, "end_step", counted)
    passage = Passage("made up", [1, 2, 3], list(range(5, 25)), 20)
    config = {"expert_memory": "50%", "predictor": "frequent", "device": "cpu"}
    arm = EngineArm(model=str(tiny), options=config, is_foretold=True)
    arm.load()
    arm.record([passage])
    assert len(steps) == passage.num_tokens - 1, "of two runs only the one in which it knows"
    arm.close()


FAKE_LLAMA = """
import ctypes
__version__ = "made up"
def llama_get_logits_ith(ctx, row):
    return ctypes.cast(ctx.logits, ctypes.c_void_p).value
class Llama:
    metadata = {"general.architecture": "deepseek"}
    def __init__(self, file, **options):
        self.ctx, self.shift = self, int(open(file).read())
        self.logits = (ctypes.c_float * 320)()
    def n_vocab(self): return 320
    def reset(self): self.count = 0
    def close(self): self.ctx = None
    def eval(self, ids):
        self.count += len(ids)
        self.logits[:] = [0.0] * 320
        self.logits[(ids[-1] + self.shift) % 320] = 1.0
"""


def test_llama_cpp_speaks_with_the_benchmark_from_a_python_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text(FAKE_LLAMA)
    (tmp_path / "weights.gguf").write_text("3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = str(tmp_path / "weights.gguf")
    told = {"python": sys.executable, "file": file, "context": 64, "threads": 1}
    passages = [Passage("a", [1, 2], [10, 20, 30], 3), Passage("free", [5], [], 3)]
    with Worker("llama.cpp", told, num_threads=1) as worker:
        external = worker.call("load", kind=External)
        assert (external.version, external.files) == ("made up", [file])
        recording = worker.call("record", passages, kind=Recording)
        # Each choice is the token before it and 3; the text is fed where there is one.
        assert recording.token_ids == [[5, 13, 23], [8, 11, 14]]
        worker.call("prepare", True, kind=float)
        measurement = worker.call("run", passages, kind=Measurement)
        assert measurement.token_ids == recording.token_ids
        assert measurement.decode_tokens == 4 and measurement.decode_s > 0
        with pytest.raises(OutriderError, match=r"llama\.cpp: .*no_such"):
            worker.call("no_such", kind=float)


def test_another_system_may_round_elsewhere_but_not_run_another_model(
    tiny: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        """accelerate's place, by an engine that changes some tokens."""

        share = 0.25

        def __init__(self, model: str, options: dict[str, Any]) -> None:
            self.arm = EngineArm(model=model, options=options)

        def load(self) -> External:
            self.arm.load()
            return External("1", 0.1, ["somewhere"])

        def record(self, passages: list[Passage]) -> Recording:
            recording = self.arm.record(passages)
            return Recording([self._changed(ids) for ids in recording.token_ids], "", [])

        def prepare(self, is_cold: bool) -> float:
            return 0.0

        def run(self, passages: list[Passage]) -> Measurement:
            run = self.arm.run(passages)
            return replace(run, token_ids=[self._changed(ids) for ids in run.token_ids], traffic={})

        def close(self) -> None:
            self.arm.close()

        def _changed(self, ids: list[int]) -> list[int]:
            changed = int(len(ids) * self.share)
            return [token + (place < changed) for place, token in enumerate(ids)]

    class WithOther(InProcess):
        def __init__(self, kind: str, told: dict[str, Any], **named: Any) -> None:
            super().__init__(kind, told, **named)
            if kind == "accelerate":
                options = {"expert_memory": "all", "prefetch": "off"}
                self.arm = Other(told["model"], options)  # type: ignore[assignment]

    monkeypatch.setattr(bench, "Worker", WithOther)
    wanted = options(tiny, arms=("on-demand", "accelerate"), is_cold=False, num_tokens=8)
    _, other = bench_decode(wanted)["rows"]
    assert other["arm"] == "accelerate" and other["token_agreement"] == 0.75
    assert other["hit_rate"] is None and not other["identical_logits"]
    monkeypatch.setattr(Other, "share", 0.75)
    with pytest.raises(MismatchError, match=r"agrees .* on 25 %"):
        bench_decode(wanted)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"arms": ("warp",)}, "warp"),
        ({"arms": ("accelerate",)}, "at least one of outrider's own"),
        ({"arms": ("resident", "llama.cpp")}, "--llama-python"),
        ({"arms": ("prefetch", "prefetch")}, "named once"),
        ({"repetitions": 0}, "repetitions"),
        ({"num_tokens": 1}, "tokens"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(
    tiny: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench_decode(options(tiny, **fields))


def test_built_in_text_is_held_out_and_files_are_read_by_line(tmp_path: Path) -> None:
    names = [name for name, _ in built_in_texts(6)]
    assert len(set(names)) == 6 and built_in_texts(2) == built_in_texts(6)[:2]
    file = tmp_path / "texts"
    file.write_text("one two\n\nthree four five\n")
    texts = read_texts(str(file), 9)
    assert texts == [("line-1", "one two"), ("line-3", "three four five")]

    def encode(texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]

    (passage,) = make_passages(texts[1:], encode, num_tokens=2, prompt_tokens=1, follows_text=True)
    assert (passage.prompt_ids, passage.text_ids) == ([5], [4, 4])
    with pytest.raises(UsageError, match="line-1 has 2 tokens"):
        make_passages(texts, encode, num_tokens=2, prompt_tokens=1, follows_text=True)
    (free, _) = make_passages(texts, encode, num_tokens=9, prompt_tokens=1, follows_text=False)
    assert (free.prompt_ids, free.text_ids, free.num_tokens) == ([3], [], 9)
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts(str(tmp_path / "absent"), 1)


def test_a_slower_link_carries_no_more_than_it_can_and_changes_no_token(
    tiny: Path, in_process: None
) -> None:
    rate = 200_000
    rows = bench_decode(options(tiny, link_bytes_per_s=rate, repetitions=1))["rows"]
    assert {row["cache"] for row in rows} == {"warm", "cold"}
    for row in rows:
        assert row["identical_logits"]
        if row["arm"] == "resident":
            assert row["link_limit_bytes_per_s"] is None
            continue
        assert row["link_limit_bytes_per_s"] == rate >= row["link_bytes_per_s"]
        # A copy that began in the prompt may end in the first decode step.
        first_bytes = row["expert_bytes"] / (2 * 5)
        carried = row["bytes_per_token"] - first_bytes
        assert carried > 0.0 and carried * row["tokens_per_second"] <= rate


def test_a_watched_token_adds_up_and_leaves_the_engine_as_it_was(tmp_path):
    arm = EngineArm(model=None, options={"expert_memory": "10%", "prefetch": "off"})
    arm.load()
    try:
        passages = make_passages(
            read_texts(BUILT_IN, 1), arm.encode, num_tokens=6, prompt_tokens=8, follows_text=True
        )
        chosen = arm.record(passages).token_ids
        transfers = arm._engine.tier.transfers
        before = (transfers.reader, dict(vars(transfers)).keys())
        line = arm.timeline(passages, "on demand")
        assert (transfers.reader, dict(vars(transfers)).keys()) == before
        assert arm.run(passages).token_ids == chosen
    finally:
        arm.close()
    work = [one for one in line["events"] if one["lane"] == "processor"]
    reads = [one for one in line["events"] if one["lane"] == "link"]
    assert line["simulated"] is False
    # Waiting and computing follow each other without a gap, from the token's start to its end.
    assert sum(one["seconds"] for one in work) == pytest.approx(line["seconds"])
    for one, following in pairwise(work):
        assert one["start_s"] + one["seconds"] == pytest.approx(following["start_s"], abs=1e-9)
    assert {one["name"].split(" ")[0] for one in work} == {"computing", "waiting"}
    assert reads and {one["name"].split(" ")[0] for one in reads} == {"on-demand"}
    assert all(0.0 <= one["start_s"] <= line["seconds"] for one in reads)
    trace = json.loads(write_trace([line], tmp_path).read_text())
    assert trace["otherData"] == {"simulated": "false"}
