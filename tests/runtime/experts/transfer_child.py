"""Run by test_transfer_stress.py with transfer_faults.c preloaded: reads every expert twice and
prints what went wrong and which faults were met."""

import ctypes
import json
import sys
from pathlib import Path

import torch

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.testing import write_experts


def main(folder: Path) -> None:
    faults = ctypes.CDLL(None)
    problems: list[str] = []
    shape = ModelShape(2, 8, 2, 48, 40, "")
    keys = [ExpertKey(layer_idx, expert_idx) for layer_idx in range(2) for expert_idx in range(8)]
    for is_packed in (True, False):
        source = write_experts(folder / str(is_packed), shape, is_packed=is_packed)
        for direct in (None, False):
            with (
                SlotArena(len(keys), source.views, source.nbytes) as arena,
                ThreadTransfer(source, arena, piece_bytes=8192, direct=direct) as engine,
            ):
                for slot in range(len(keys)):
                    arena.poison(slot)
                engine.submit(keys[0], 0, Kind.ON_DEMAND).wait()
                faults.fault_arm(1)
                transfers = [
                    engine.submit(key, slot, Kind.PREFETCH) for slot, key in enumerate(keys)
                ]
                for transfer in transfers:
                    try:
                        transfer.wait()
                    except TransferError as error:
                        problems.append(str(error))
                        continue
                    for name, expected in source.reference(transfer.key).items():
                        if not torch.equal(arena.view(transfer.slot, name), expected):
                            problems.append(f"{transfer.key} {name} differs")
                faults.fault_arm(0)
    counts = [faults.fault_count(kind) for kind in range(5)]
    sys.stdout.write(json.dumps({"problems": problems, "counts": counts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
