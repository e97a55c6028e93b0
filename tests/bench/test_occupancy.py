"""The calculation for a card, against cases worked out by hand."""

from dataclasses import replace

import pytest

from outrider.bench.expectations import expected_row
from outrider.bench.model_shapes import model_shapes
from outrider.bench.occupancy import (
    RTX_3090,
    Card,
    Launch,
    expected,
    resident_programs,
)
from outrider.kernels.compiled import Figures

# 10 multiprocessors at 1 GHz with one scheduler, 1000 bytes/us, 1 us latency, free launches.
CARD = Card(
    "by hand", 86, 1e9, 10, 1e9, 48, 16, 65536, 100 << 10,
    schedulers=1, latency_s=1e-6, launch_s=0.0,
)  # fmt: skip
FIGURES = Figures(
    registers=32, spill_bytes=0, shared_bytes=0, num_warps=4, loop_instructions=10, wide_loads=1
)


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        # 48 warps / 4 a program
        ({}, 12),
        # 65536 / (72 x 128): 72 registers are 9 eights
        ({"registers": 72}, 7),
        # 73 registers are given out as 80: 65536 / (80 x 128)
        ({"registers": 73}, 6),
        # 100 KiB / (24 KiB + the system's 1 KiB)
        ({"shared_bytes": 24 << 10}, 4),
        ({"shared_bytes": (24 << 10) + 1}, 3),
        # one warp: 16 programs at most, though 48 warps would fit
        ({"num_warps": 1, "registers": 32}, 16),
    ],
    ids=["warps", "registers", "registers-rounded", "shared", "shared-one-more", "programs"],
)
def test_programs_on_a_multiprocessor_are_bounded_by_the_scarcest_resource(change, programs):
    assert resident_programs(replace(FIGURES, **change), CARD) == programs


def test_enough_bytes_under_way_reach_the_memorys_speed():
    # 120 programs at once x 1000 B under way / 1 us = 120 GB/s; issue: 10e9 / 40 x 1000 = 250 GB/s
    launch = Launch(FIGURES, num_programs=120, num_bytes=1_200_000, step_bytes=1000)
    result = expected([launch], CARD)
    assert result.seconds == pytest.approx(1_200_000 / 1e9)
    assert result.share == pytest.approx(1.0)
    assert result.bound == "memory"


def test_too_few_bytes_under_way_are_bound_by_latency():
    # 120 x 4 B / 1 us = 0.48 GB/s of 1; issue: 10e9 / 40 x 4 = 1 GB/s
    launch = Launch(FIGURES, num_programs=120, num_bytes=480_000, step_bytes=4)
    result = expected([launch], CARD)
    assert result.seconds == pytest.approx(480_000 / 0.48e9)
    assert result.bound == "latency"


def test_too_many_instructions_a_byte_are_bound_by_issue():
    # 10e9 / (1000 x 4 warps) x 100 B = 0.25 GB/s; latency: 120 x 100 / 1 us = 12 GB/s
    launch = Launch(replace(FIGURES, loop_instructions=1000), 120, 250_000, 100)
    result = expected([launch], CARD)
    assert result.seconds == pytest.approx(250_000 / 0.25e9)
    assert result.bound == "issue"


@pytest.mark.parametrize("waves", [1, 2])
def test_a_last_wave_that_fills_no_card_takes_its_own_time(waves):
    # 120 programs at 0.48 GB/s, once or twice, then one alone: 4 B a microsecond = 4 MB/s.
    count = 120 * waves + 1
    result = expected([Launch(FIGURES, count, 1000 * count, step_bytes=4)], CARD)
    assert result.seconds == pytest.approx(waves * 120_000 / 0.48e9 + 1000 / 4e6)
    assert result.bound == "latency"


def test_launches_add_up_and_each_costs_its_start():
    card = replace(CARD, launch_s=1e-3)
    launch = Launch(FIGURES, num_programs=120, num_bytes=1_000_000, step_bytes=1000)
    result = expected([launch, launch], card, num_other_launches=2)
    assert result.seconds == pytest.approx(2 * 1e-3 + 4 * 1e-3)
    assert result.share == pytest.approx(2e6 / 6e-3 / 1e9)


def test_an_rtx_3090s_bandwidth_is_that_of_its_memory():
    assert RTX_3090.bytes_per_s == pytest.approx(19.5e9 * 384 / 8, rel=1e-9)


def test_a_models_expectation_counts_its_experts_bytes_and_is_no_measurement():
    model = model_shapes()["deepseek-moe-16b"]
    row = expected_row(model, "expert_mlp", "bf16", RTX_3090)
    num_bytes = 6 * 3 * 2048 * 1408 * 2
    assert row["share_of_bandwidth"] == pytest.approx(num_bytes / row["seconds"] / 936e9)
    assert row["is_verified"] is False
    assert 0.5 < row["share_of_bandwidth"] < 1
    linear = expected_row(model, "linear", "bf16", RTX_3090)
    assert linear["share_of_bandwidth"] * linear["seconds"] * 936e9 == pytest.approx(2 * 2048**2)
