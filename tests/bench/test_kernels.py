"""`outrider bench kernels`: what it measures is right, and what is wrong gets no speed."""

import json

import pytest
import torch
from typer.testing import CliRunner

from outrider.bench import documents, kernel_cases, kernels
from outrider.bench.expert_case import ExpertCase, relative_error
from outrider.bench.kernels import KernelOptions, bench_kernels, wrong_rows
from outrider.bench.stopwatch import Clock, Stint, interleave
from outrider.kernels.quantization import FORMATS, dequantize
from outrider.kernels.reference import expert_outputs_reference
from outrider.runtime.commands.bench import app
from outrider.runtime.errors import InsufficientMemoryError, UsageError

SMALL = KernelOptions(
    shapes=("olmoe-1b-7b", "qwen1.5-moe"),
    formats=("int8",),
    arena_bytes=1 << 20,
    prefill_tokens=16,
    repetitions=1,
)


def _silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total, what


@pytest.fixture(scope="module")
def document():
    return bench_kernels(SMALL, progress=_silent)


def test_document_is_what_its_schema_says(document):
    assert documents.check(json.loads(json.dumps(document)), source="here") == "kernels"


def test_rows_carry_what_the_interface_promises_and_are_right(document):
    rows = document["rows"]
    assert {(row["op"], row["phase"], row["shape"]) for row in rows} == {
        (op, phase, shape)
        for op in ("expert_mlp", "linear")
        for phase in ("decode", "prefill")
        for shape in SMALL.shapes
    }
    assert {row["impl"] for row in rows} == {"cpu", "torch"}
    assert wrong_rows(document) == []
    for row in rows:
        assert row["format"] == "int8"
        assert 0 < row["error"] <= row["tolerance"]
        assert row["share_of_read"] > 0
        taken_s = row["microseconds"] / 1e6
        moved = row["gb_per_s"] * 1e9 * taken_s
        if row["op"] == "linear":
            assert moved == pytest.approx(2048 * (2048 + 4))
        assert row["commit"]
        assert row["versions"]["torch"] == torch.__version__
    by_key = {(r["op"], r["phase"], r["shape"], r["impl"]): r for r in rows}
    decode = by_key["expert_mlp", "decode", "qwen1.5-moe", "cpu"]
    one = 3 * 2048 * 1408 + 4 * (2 * 1408 + 2048)
    assert decode["gb_per_s"] * decode["microseconds"] * 1e3 == pytest.approx(4 * one)
    assert by_key["expert_mlp", "prefill", "olmoe-1b-7b", "cpu"]["share_of_matmul"].keys() == {
        "fp32",
        "bf16",
    }


def test_a_wrong_result_has_no_speed_and_the_command_fails(monkeypatch):
    right = kernel_cases.expert_outputs

    def wrong(rows, assignments, weights, **options):
        out = right(rows, assignments, weights, **options)
        out[:, :16] *= 1.25
        return out

    monkeypatch.setattr(kernel_cases, "expert_outputs", wrong)
    result = CliRunner().invoke(
        app,
        [
            "kernels",
            "--json",
            "--ops",
            "expert_mlp",
            "--impls",
            "cpu",
            "--phases",
            "decode",
            "--shapes",
            "olmoe-1b-7b",
            "--formats",
            "int4",
            "--arena",
            "1MiB",
            "--repetitions",
            "1",
        ],
    )
    assert result.exit_code == 1
    assert "wrong" in str(result.exception)
    (row,) = json.loads(result.stdout)["rows"]
    assert row["error"] > row["tolerance"]
    assert row["gb_per_s"] is None
    assert row["share_of_read"] is None
    assert not row["is_correct"]


def test_combine_counts_as_wrong_when_one_bit_differs(monkeypatch):
    right = kernel_cases.combine

    def off_by_one_bit(outputs, weights, ids, **options):
        out = right(outputs, weights, ids, **options)
        out.view(torch.int16)[0, 0] ^= 1
        return out

    monkeypatch.setattr(kernel_cases, "combine", off_by_one_bit)
    options = KernelOptions(
        shapes=("olmoe-1b-7b",),
        formats=("bf16",),
        ops=("combine",),
        phases=("decode",),
        arena_bytes=1 << 20,
        repetitions=1,
    )
    (row,) = bench_kernels(options, progress=_silent)["rows"]
    assert not row["is_correct"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (KernelOptions(shapes=("gpt-17",)), "--shapes 'gpt-17'.*deepseek-moe-16b"),
        (KernelOptions(formats=("int3",)), "--formats 'int3'.*int8"),
        (KernelOptions(impls=("triton",)), "--impls 'triton'.*reference"),
        (KernelOptions(ops=()), "nothing to measure"),
        (KernelOptions(repetitions=0), "--repetitions must be at least 1; got 0"),
        (KernelOptions(threads=0), "--threads must be at least 1; got 0"),
        (KernelOptions(device="tpu"), "'tpu' is unknown; accepted: cpu, cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_mean_nothing_are_refused_by_name(options, words):
    with pytest.raises(UsageError, match=words):
        bench_kernels(options, progress=_silent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_without_cuda_the_gpu_benchmark_and_the_tuning_say_so():
    for tune in ([], ["--tune"]):
        result = CliRunner().invoke(app, ["kernels", "--device", "cuda", *tune])
        assert isinstance(result.exception, UsageError)
        assert "finds no CUDA device" in str(result.exception)


def test_an_arena_that_does_not_fit_is_refused_with_both_sizes():
    options = KernelOptions(shapes=("olmoe-1b-7b",), arena_bytes=1 << 60)
    with pytest.raises(InsufficientMemoryError, match="does not fit"):
        bench_kernels(options, progress=_silent)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_benchmarks_own_truth_is_the_reference(fmt):
    experts = ExpertCase(128, 64, fmt, 1 << 16, 3, torch.device("cpu"))
    rows = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    for slot in (0, experts.num_slots - 1):
        tokens, slots = torch.arange(2), torch.full((2,), slot)
        truth = expert_outputs_reference(rows, tokens, slots, experts.weights)
        assert relative_error(experts.expert_rows(rows, slot), truth) < 1e-6
    part = experts.rows_of("gate_up_proj", 1, 96)
    dense = dequantize(part, fmt, dtype=torch.float32, shape=(96, 128))
    whole = dequantize(experts.parts("gate_up_proj", 1), fmt, dtype=torch.float32, shape=(128, 128))
    assert torch.equal(dense, whole[:96])
    assert experts.num_slots * experts.block_bytes >= 1 << 16


def test_relative_error_of_nothing_finite_is_infinite():
    truth = torch.ones(4)
    assert relative_error(torch.tensor([1.0, 1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(truth, truth) == 0


class _CountingClock(Clock):
    """A clock on which each unit of work says how long it took."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0.0

    def seconds(self, work):
        began = self.now
        work()
        return self.now - began


def test_a_stint_goes_on_over_the_arena_where_it_stopped_and_gives_seconds_a_call():
    clock, turns = _CountingClock(), []

    def call(turn: int) -> None:
        turns.append(turn)
        clock.now += 0.001

    stint = Stint(call, 64 << 20, clock)
    assert stint.num_calls == 3
    assert stint.seconds() == pytest.approx(0.001)
    assert stint.seconds() == pytest.approx(0.001)
    assert turns == list(range(7))


def test_measures_are_taken_in_turn_and_the_first_round_is_thrown_away():
    order = []
    measures = [lambda name=name: order.append(name) or float(len(order)) for name in "ab"]
    assert interleave(measures, 2) == [[3.0, 5.0], [4.0, 6.0]]
    assert order == list("ababab")


def test_shares_for_a_card_are_calculated_without_timing_and_say_so():
    result = CliRunner().invoke(
        app,
        [
            "kernels",
            "--expected",
            "rtx3090",
            "--json",
            "--shapes",
            "mixtral-8x7b",
            "--formats",
            "bf16,int4",
        ],
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["calculated"]
    assert len(document["rows"]) == 4
    for row in document["rows"]:
        assert row["gb_per_s"] is None
        assert row["expected"]["is_verified"] is False
        assert 0 < row["expected"]["share_of_bandwidth"] < 1
    with pytest.raises(UsageError, match="rtx3090"):
        kernels.KernelOptions().check()
        CliRunner().invoke(app, ["kernels", "--expected", "h100"], catch_exceptions=False)
