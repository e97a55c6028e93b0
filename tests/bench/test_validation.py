"""The simulator held against machines: a made-up one whose times are known, and this one."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import planted_routing as planted
import pytest

from outrider.bench import documents
from outrider.bench.arm import EngineArm
from outrider.bench.records import Subject
from outrider.bench.throttle import ThrottledReader
from outrider.bench.validation.apart import CallTimes, Interruption, ReadTimes, interruption
from outrider.bench.validation.configurations import Configuration, calibrated_on, unseen
from outrider.bench.validation.machine import Observation, Step, observe
from outrider.bench.validation.model import Machine, calibrate, simulate, simulated_steps
from outrider.bench.validation.told import Told
from outrider.bench.validation.validate import ValidateOptions, bench_validate
from outrider.bench.workload import BUILT_IN, make_passages, read_texts
from outrider.runtime.errors import UsageError
from outrider.runtime.experts.pieces import Halt, Piece
from outrider.runtime.experts.reader import ReadPlan

TRUE = Machine(
    token_s=4e-3, fetch_s=3e-4, miss_s=6e-5, wake_s=1e-4, wake_share=0.05, dense_bytes_per_s=12e9,
    leave_s=5e-5,
)  # fmt: skip
INTERRUPTION = Interruption(TRUE.leave_s, TRUE.wake_s, TRUE.wake_share)
LENGTH, SEQUENCES = 40, 4


def subject_of(expert_bytes: int, slots: int, routing) -> Subject:
    shape = routing.shape
    routed = shape.num_moe_layers * shape.top_k * expert_bytes
    return Subject(
        model="m", fingerprint="f", format="bf16", dtype="bfloat16", device="cpu",
        device_name="made up",
        predictor="none", prefetch="off", eviction="layer-lfu",
        num_moe_layers=shape.num_moe_layers, num_experts=shape.num_experts, top_k=shape.top_k,
        num_slots=slots, budget_bytes=slots * expert_bytes, expert_bytes=expert_bytes,
        active_bytes=2 * routed, dense_bytes=routed, num_threads=1, load_s=0.0, files=[],
    )  # fmt: skip


def made_up(configuration: Configuration, *, slots: int, expert_bytes: int, told=None, truth=TRUE):
    """What a machine would show of a configuration: speeds that are right, steps that vary."""
    routing = planted.routing(seed=0, sequences=SEQUENCES, length=LENGTH, layers=4)
    blank = Step(0.0, 0.0, 0, 0)
    seen = Observation(
        configuration, subject_of(expert_bytes, slots, routing), routing, lambda: None,
        [[blank] * (SEQUENCES * (LENGTH - planted.PROMPT))],
        reads=ReadTimes(1e-4, 3e-5 + expert_bytes / 1e9),
        calls=CallTimes(1e-5, expert_bytes / 12e9),
    )  # fmt: skip
    steps = [
        Step(one.busy_s + one.stall_s, one.stall_s, one.misses, one.issued)
        for one in simulated_steps(truth, seen, told)
    ]
    return replace(seen, repetitions=[steps]), simulate(truth, seen, told)


@pytest.mark.parametrize("has_resident", [True, False])
def test_a_machine_is_found_again_from_what_it_did(has_resident):
    small, _ = made_up(Configuration(None, "25%"), slots=12, expert_bytes=70_000)
    large, _ = made_up(Configuration("geometry", "25%"), slots=12, expert_bytes=4_000_000)
    resident, _ = made_up(Configuration(None, "all"), slots=48, expert_bytes=70_000)
    seen = [small, resident, large] if has_resident else [small, large]
    machine = calibrate(seen, [None] * len(seen), INTERRUPTION)
    for name in ("token_s", "fetch_s", "miss_s", "wake_s", "wake_share", "dense_bytes_per_s"):
        assert getattr(machine, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name
    for slots in (6, 20, 36):
        for size in (70_000, 4_000_000):
            seen, found = made_up(Configuration(None, "x"), slots=slots, expert_bytes=size)
            guess = simulate(machine, seen, None)
            assert guess.tokens_per_second == pytest.approx(found.tokens_per_second, rel=0.03)


def test_what_reading_ahead_costs_beside_an_engine_is_found_again():
    small, _ = made_up(Configuration(None, "25%"), slots=12, expert_bytes=70_000)
    told = Told(planted.foretold(small.routing, noise=0.2), 2e-4)
    truth = replace(TRUE, forecast_factor=4.0, issue_s=3e-4)
    ahead = Configuration(None, "25%", prefetch="on")
    seen, _ = made_up(ahead, slots=12, expert_bytes=70_000, told=told, truth=truth)
    machine = calibrate([small, seen], [None, told], INTERRUPTION)
    assert machine.issue_s == pytest.approx(truth.issue_s, rel=0.3)
    assert machine.forecast_factor == pytest.approx(truth.forecast_factor, rel=0.15)
    other, found = made_up(ahead, slots=24, expert_bytes=70_000, told=told, truth=truth)
    guess = simulate(machine, other, told).tokens_per_second
    assert guess == pytest.approx(found.tokens_per_second, rel=0.03)


def test_what_a_wait_leaves_behind_is_told_from_the_wait(monkeypatch):
    """A made-up engine takes 0.2 ms and a tenth of the sleep more after it, on a false clock."""
    clock = Clock()
    monkeypatch.setattr("outrider.bench.validation.apart.time", clock)
    monkeypatch.setattr("outrider.bench.validation.apart.adapter.install", clock.install)
    layers = [SimpleNamespace() for _ in range(4)]
    engine = SimpleNamespace(
        loaded=SimpleNamespace(model=None, layers=layers),
        tier=SimpleNamespace(
            source=SimpleNamespace(shape=SimpleNamespace(num_moe_layers=4)),
            executor=SimpleNamespace(forward=clock.compute),
        ),
    )

    def token_s() -> float:
        began = clock.now
        for _ in layers:
            clock.forward()
        return clock.now - began

    clock.forward = clock.native
    found = interruption(engine, token_s)
    assert (found.leave_s, found.wake_s, found.wake_share) == pytest.approx((3e-4, 2e-4, 0.1))
    assert clock.forward == clock.native


class Clock:
    """Sleeps and layers on a clock that nobody waits for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept_s = 0.0
        self.forward = self.native

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1.1 * seconds  # later than asked for, as systems do
        self.slept_s = 1.1 * seconds

    def native(self) -> None:
        self.now += 7e-4

    def compute(self) -> None:
        self.now += 1e-3 + (2e-4 + 0.1 * self.slept_s if self.slept_s else 0.0)
        self.slept_s = 0.0

    def install(self, model, layers, forward) -> None:
        self.forward = self.native if forward == self.compute else forward


def test_throttled_disk_is_never_faster():
    seen, _ = made_up(Configuration(None, "25%"), slots=12, expert_bytes=70_000)
    speeds = [
        simulate(
            TRUE,
            replace(seen, configuration=Configuration(None, "25%", throttle_bytes_per_s=rate)),
            None,
        ).tokens_per_second
        for rate in (1e7, 1e8, 1e12)
    ]
    assert speeds == sorted(speeds)
    assert speeds[2] == pytest.approx(simulate(TRUE, seen, None).tokens_per_second)


def test_throttled_reader_keeps_to_its_speed_over_all_threads():
    class Instant:
        def read_run(self, plan, run, *, slot, bounce, halt):
            for index in run:
                ((start, length),) = plan.pieces[index].parts
                slot[start : start + length] = b"x" * length
            return len(run)

    reader = ThrottledReader(Instant(), 1e6)
    pieces = [Piece(Path("file"), at, 5_000, ((at, 5_000),)) for at in (0, 5_000)]
    target, halt = memoryview(bytearray(10_000)), Halt(0)

    def read():
        reader.read_run(ReadPlan(pieces), range(2), slot=target, bounce=target, halt=halt)

    threads = [threading.Thread(target=read) for _ in range(6)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - began >= 0.06
    assert bytes(target) == b"x" * 10_000


def test_replay_misses_what_the_engine_missed():
    """On demand, warm: the same look-ups of the same slots, to the last one."""
    encoder = EngineArm(model=None, options={"expert_memory": "25%", "prefetch": "off"})
    encoder.load()
    passages = make_passages(
        read_texts(BUILT_IN, 2), encoder.encode, num_tokens=8, prompt_tokens=6, follows_text=True
    )
    encoder.close()
    for eviction in ("lru", "layer-lfu"):
        one = Configuration(None, "25%", eviction=eviction)
        (seen,) = observe([one], passages, repetitions=1)
        steps = [step for one in seen.repetitions for step in one]
        found = simulate(TRUE, seen, None)
        assert min(seen.reads.send_s, seen.calls.expert_s) > 0.0 and seen.interruption is None
        assert found.misses == pytest.approx(sum(one.misses for one in steps) / len(steps))


def test_configurations_are_distinct_and_enough():
    for geometry in (None, "folder"):
        known, others = calibrated_on(geometry), unseen(geometry)
        assert len(known) <= 3 and len(others) >= 10
        assert len({one.name for one in known + others}) == len(known + others)
        assert not set(known) & set(others)


def test_geometry_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="make-geometry"):
        bench_validate(ValidateOptions(geometry=str(tmp_path)), progress=lambda *told: None)


@pytest.mark.slow
def test_validation_document_is_what_its_schema_says():
    options = ValidateOptions(passages=1, tokens=10, repetitions=1)
    document = bench_validate(options, progress=lambda *told: None)
    assert documents.check(json.loads(json.dumps(document)), source="here") == "validate"
    assert all(row["simulated_misses"] == pytest.approx(row["measured_misses"], abs=1e-6)
               for row in document["rows"] if row["prefetch"] == "off")  # fmt: skip
