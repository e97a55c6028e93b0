"""Arms that have no room beside each other: told before they take anything, with what would fit."""

from pathlib import Path
from typing import Any

import pytest
from families import make_checkpoint

from outrider.bench import decode as bench
from outrider.bench import room
from outrider.bench.arm import EngineArm
from outrider.bench.decode import DecodeOptions, bench_decode
from outrider.bench.lineup import Arm
from outrider.bench.records import Subject
from outrider.runtime import memory
from outrider.runtime.errors import InsufficientMemoryError, UsageError

GIB = 1 << 30
OWN = room.OWN_BYTES
SLOT, DENSE, NUM_EXPERTS = 64 << 20, GIB, 128
LIKE = Subject(
    model="m", fingerprint="f", format="int8", dtype="bfloat16", device="cpu", predictor="none",
    prefetch="off", eviction="lru", num_moe_layers=8, num_experts=16, top_k=2, num_slots=64,
    budget_bytes=64 * SLOT, expert_bytes=SLOT, active_bytes=2 * GIB, dense_bytes=DENSE,
    num_threads=2, load_s=1.0, files=[], device_name="made up",
)  # fmt: skip
OURS = Arm("engine", {})
RESIDENT = Arm("engine", {}, is_resident=True)
ACCELERATE = Arm("accelerate", {}, is_external=True)


def require(arms: dict[str, Arm], available: int, *, limit: int | str | None = None) -> None:
    room.require(arms, "50%", LIKE, limit=limit, available_bytes=available)


def test_needs_are_what_arms_hold_to_the_byte() -> None:
    """4 GiB of experts at a half, 8 in all, each with its dense weights and its process."""
    arms = {"resident": RESIDENT, "on-demand": OURS, "prefetch": OURS}
    needed = (8 + 4 + 4) * GIB + 3 * (DENSE + OWN)
    require(arms, needed)
    with pytest.raises(InsufficientMemoryError) as raised:
        require(arms, needed - 1)
    said = str(raised.value)
    for part in ("50%", "3 arms", "20.5 GiB", "resident 9.50 GiB", "on-demand 5.50 GiB",
                 "prefetch 5.50 GiB", "fewer --arms", "49% fits"):  # fmt: skip
        assert part in said, part
    # What is advised is accepted.
    smaller = room.at_budget(LIKE, "49%", available_bytes=0)
    room.require(arms, "49%", smaller, limit=None, available_bytes=needed - 1)


def test_nothing_smaller_is_advised_where_nothing_smaller_helps() -> None:
    with pytest.raises(InsufficientMemoryError) as raised:
        require({"resident": RESIDENT, "on-demand": OURS}, 4 * GIB)
    assert "--expert-memory (" not in str(raised.value)
    assert "fewer --arms" in str(raised.value)


def test_other_systems_take_what_they_are_let(tmp_path: Path) -> None:
    """Mapped pages are given back when they are wanted, but not by an arm that holds them all."""
    file = tmp_path / "weights.gguf"
    with file.open("wb") as opened:
        opened.truncate(3 * GIB)
    ours = 4 * GIB + DENSE + OWN
    mapped = Arm("llama.cpp", {"file": str(file)}, is_external=True)
    held = Arm("llama.cpp", {"file": str(file)}, is_external=True, is_resident=True)
    for arm, limit, more in (
        (mapped, None, OWN),
        (held, None, 3 * GIB + OWN),
        (ACCELERATE, 6 * GIB, 6 * GIB),
        (ACCELERATE, "auto", 4 * GIB + DENSE + room.LIMIT_RESERVE_BYTES),
    ):
        require({"on-demand": OURS, "other": arm}, ours + more, limit=limit)
        with pytest.raises(InsufficientMemoryError, match="other"):
            require({"on-demand": OURS, "other": arm}, ours + more - 1, limit=limit)


def test_a_limit_that_an_arm_cannot_keep_is_refused() -> None:
    require({"on-demand": OURS}, 99 * GIB, limit=5 * GIB)
    with pytest.raises(UsageError, match=r"memory limit 4\.\d+ GiB: arm on-demand holds 5.00 GiB"):
        require({"resident": RESIDENT, "on-demand": OURS}, 99 * GIB, limit=5 * GIB - (64 << 20))
    # Limits do not concern an arm that holds everything.
    require({"resident": RESIDENT}, 99 * GIB, limit=GIB)


def test_budgets_of_every_form_are_brought_to_slots() -> None:
    def slots(budget: str) -> int:
        return room.at_budget(LIKE, budget, available_bytes=2 * GIB).num_slots

    assert [slots(budget) for budget in ("25%", "1GiB", "all", "auto")] == [32, 16, NUM_EXPERTS, 16]
    with pytest.raises(UsageError, match="less than one expert"):
        slots("1KiB")


@pytest.mark.parametrize(
    ("budgets", "arms"),
    [(("25%",), ("resident", "on-demand", "prefetch")), (("25%", "100%"), ("on-demand", "oracle"))],
    ids=["one-budget", "the-second-budget"],
)
def test_the_benchmark_refuses_before_a_second_arm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: tuple[str, ...], arms: tuple[str, ...]
) -> None:
    model = make_checkpoint(tmp_path, "deepseek")
    started: list[EngineArm] = []

    class InProcess:
        def __init__(self, kind: str, options: dict[str, Any], **_: Any) -> None:
            self.arm = EngineArm(**options) if kind == "engine" else None
            if self.arm is not None:
                started.append(self.arm)

        def ask(self, method: str) -> None:
            assert method == "load"

        def answer(self, kind: Any) -> Any:
            assert self.arm is not None
            return self.arm.load()

        def __enter__(self) -> "InProcess":
            return self

        def __exit__(self, *_: object) -> None:
            if self.arm is not None:
                self.arm.close()

    probe = EngineArm(model=str(model), options={"expert_memory": budgets[-1], "prefetch": "off"})
    like = probe.load()
    probe.close()
    needed = len(arms) * (OWN + like.dense_bytes + like.budget_bytes)
    if "resident" in arms:
        needed += room.at_budget(like, "all", available_bytes=0).budget_bytes - like.budget_bytes
    monkeypatch.setattr(bench, "Worker", InProcess)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    # The engine asks for itself whether it has room.
    monkeypatch.setattr(memory, "device_bytes", lambda *_: (64 * GIB, 64 * GIB))
    said = rf"{budgets[-1]}: {len(arms)} arms side by"
    with pytest.raises(InsufficientMemoryError, match=said):
        bench_decode(DecodeOptions(model=str(model), budgets=budgets, arms=arms))
    assert len(started) == 1
