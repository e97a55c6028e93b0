"""Copies under faults that the operating system injects, and under random delays and cancellations:
a reader sees an expert whole, or an error, and never what was in the slot before."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import ExpertCache, Kind, SlotState
from outrider.runtime.experts.eviction import LruEviction
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.experts.transfer import Transfer
from outrider.runtime.testing import write_experts

HERE = Path(__file__).parent
SHAPE = ModelShape(2, 8, 2, 48, 40, "")
KEYS = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(2) for expert_idx in range(8)]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the fault library")
def test_faults_of_the_operating_system_are_survived(tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "transfer_faults.c", "-ldl"],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, HERE / "transfer_child.py", tmp_path],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["problems"] == []
    # Each fault was really met: the preloaded library stands where the reads go.
    assert all(count >= 5 for count in outcome["counts"]), outcome["counts"]


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "checkpoint"])
@pytest.mark.parametrize("num_slots", [1, 3, 6])
def test_a_reader_never_sees_a_half_written_slot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python_reads: None,
    num_slots: int,
    is_packed: bool,
) -> None:
    generator = random.Random(num_slots)
    source = write_experts(tmp_path, SHAPE, is_packed=is_packed)
    preadv = os.preadv

    def moody(fd: int, buffers: list[memoryview], offset: int) -> int:
        mood = generator.random()
        if mood < 0.3:
            time.sleep(mood * 1e-3)
        if mood > 0.9:
            return preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)
        if mood > 0.88:
            raise OSError(5, "injected")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", moody)
    cache = ExpertCache(
        num_slots, eviction=LruEviction(SHAPE, num_slots), prefetch_limit=num_slots // 2
    )
    in_flight: dict[ExpertKey, Transfer] = {}
    num_read = num_cancelled = 0
    with (
        SlotArena(num_slots, source.views, source.nbytes) as arena,
        ThreadTransfer(source, arena, num_threads=3, piece_bytes=4096) as engine,
    ):

        def end(transfer: Transfer) -> bool:
            del in_flight[transfer.key]
            try:
                transfer.wait()
            except TransferError:
                cache.abandon(transfer.slot)
                return False
            cache.commit(transfer.slot)
            return True

        for _ in range(600):
            key = generator.choice(KEYS)
            action = generator.random()
            if action < 0.5 and cache.state(key) is None:
                kind = Kind.PREFETCH if action < 0.25 else Kind.ON_DEMAND
                slot = cache.reserve(key, kind)
                if slot is not None:
                    arena.poison(slot)
                    in_flight[key] = engine.submit(key, slot, kind)
            elif action < 0.6 and in_flight:
                transfer = generator.choice(list(in_flight.values()))
                if transfer.cancel():
                    num_cancelled += 1
                    assert not end(transfer)
                else:
                    engine.promote(transfer)
            elif in_flight and (action < 0.8 or cache.num_loading == num_slots):
                end(generator.choice(list(in_flight.values())))
            for transfer in [item for item in in_flight.values() if item.done()]:
                end(transfer)
            resident = cache.resident()
            if resident:
                with cache.pin([generator.choice(list(resident))]) as lease:
                    ((key, slot),) = lease.slots.items()
                    for name, expected in source.reference(key).items():
                        assert torch.equal(arena.view(slot, name), expected), (key, name)
                    num_read += 1
                    cache.record_use(key)
            cache.check()
        for transfer in list(in_flight.values()):
            end(transfer)
        assert engine.outstanding_bytes() == 0
        assert not engine.degraded
    assert cache.num_loading == 0
    assert all(cache.state(key) is SlotState.READY for key in cache.resident())
    assert num_read > 100
    assert num_cancelled > 0 or num_slots == 1
