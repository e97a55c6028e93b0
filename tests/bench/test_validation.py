"""The simulator held against machines: a made-up one whose times are known, and this one."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import planted_routing as planted
import pytest

from outrider.bench import documents
from outrider.bench.arm import EngineArm
from outrider.bench.records import Subject
from outrider.bench.throttle import ThrottledReader
from outrider.bench.validation.configurations import Configuration, calibrated_on, unseen
from outrider.bench.validation.machine import Observation, Step, observe
from outrider.bench.validation.model import Machine, Told, calibrate, lacking_layers, simulate
from outrider.bench.validation.validate import ValidateOptions, bench_validate
from outrider.bench.workload import BUILT_IN, make_passages, read_texts
from outrider.runtime.errors import UsageError
from outrider.runtime.experts.pieces import Halt, Piece
from outrider.runtime.experts.reader import ReadPlan

TRUE = Machine(
    token_s=4e-3, fetch_s=3e-4, miss_s=6e-5, weight_bytes_per_s=12e9, latency_s=2e-4,
    link_bytes_per_s=9e8,
)  # fmt: skip
LENGTH, SEQUENCES = 40, 4


def subject_of(expert_bytes: int, slots: int, routing) -> Subject:
    shape = routing.shape
    routed = shape.num_moe_layers * shape.top_k * expert_bytes
    return Subject(
        model="m", fingerprint="f", format="bf16", dtype="bfloat16", device="cpu",
        predictor="none", prefetch="off", eviction="layer-lfu",
        num_moe_layers=shape.num_moe_layers, num_experts=shape.num_experts, top_k=shape.top_k,
        num_slots=slots, budget_bytes=slots * expert_bytes, expert_bytes=expert_bytes,
        active_bytes=2 * routed, dense_bytes=routed, num_threads=1, load_s=0.0, files=[],
    )  # fmt: skip


def made_up(configuration: Configuration, *, slots: int, expert_bytes: int, seed: int = 0):
    """What TRUE would show of a configuration: speeds that are right, steps that vary."""
    routing = planted.routing(seed=seed, sequences=SEQUENCES, length=LENGTH, layers=4)
    blank = Step(0.0, 0.0, 0, 0)
    steps = [[blank] * (SEQUENCES * (LENGTH - planted.PROMPT))]
    seen = Observation(
        configuration, subject_of(expert_bytes, slots, routing), routing, lambda: None, steps,
        num_pieces=-(-expert_bytes // (1 << 20)),
    )  # fmt: skip
    found = simulate(TRUE, seen, None)
    weights_s = seen.subject.active_bytes / TRUE.weight_bytes_per_s
    observed = [
        Step(
            TRUE.token_s
            + weights_s
            + TRUE.fetch_s * lacking
            + TRUE.miss_s * misses
            + found.stall_s,
            found.stall_s,
            int(misses),
            0,
        )
        for lacking, misses in lacking_layers(seen)
    ]
    return replace(seen, repetitions=[observed]), found


def test_a_machine_is_found_again_from_what_it_did():
    small, _ = made_up(Configuration(None, "25%"), slots=12, expert_bytes=70_000)
    large, _ = made_up(Configuration("geometry", "25%"), slots=12, expert_bytes=4_000_000)
    machine = calibrate([small, large], [None, None])
    for name in (
        "token_s",
        "fetch_s",
        "miss_s",
        "weight_bytes_per_s",
        "latency_s",
        "link_bytes_per_s",
    ):
        assert getattr(machine, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name
    for slots in (6, 20, 36):
        for size in (70_000, 4_000_000):
            seen, found = made_up(Configuration(None, "x"), slots=slots, expert_bytes=size)
            guess = simulate(machine, seen, None)
            assert guess.tokens_per_second == pytest.approx(found.tokens_per_second, rel=0.03)


def test_what_forecasts_cost_beside_an_engine_is_found_again():
    factor = 4.0
    small, _ = made_up(Configuration(None, "25%"), slots=12, expert_bytes=70_000)
    ahead = replace(small, configuration=Configuration(None, "25%", prefetch="on"))
    told = Told(planted.foretold(ahead.routing, noise=0.2), 2e-4)
    truth = replace(TRUE, forecast_factor=factor)
    token_s = 1.0 / simulate(truth, ahead, told).tokens_per_second
    steps = [[Step(token_s, 0.0, 1, 0)] * len(ahead.repetitions[0])]
    machine = calibrate([small, replace(ahead, repetitions=steps)], [None, told])
    other, _ = made_up(Configuration(None, "x"), slots=24, expert_bytes=70_000)
    other = replace(other, configuration=ahead.configuration)
    assert machine.forecast_factor == pytest.approx(factor, rel=0.15)
    guess = simulate(machine, other, told).tokens_per_second
    assert guess == pytest.approx(simulate(truth, other, told).tokens_per_second, rel=0.03)


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
        seen = observe(Configuration(None, "25%", eviction=eviction), passages, repetitions=1)
        steps = [step for one in seen.repetitions for step in one]
        found = simulate(replace(TRUE, weight_bytes_per_s=1e12), seen, None)
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
