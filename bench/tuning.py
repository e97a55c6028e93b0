"""Finds the block sizes of the Triton kernels that one CUDA card is fastest with, and keeps them.

Every candidate is checked before it is timed. It has run on no card so far: only its search and its
file are tested. `runtime.tuned_blocks` reads the file.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..kernels.blocks import Blocks, block_sizes, save_table, table_key, using_table
from ..runtime.errors import OutriderError
from ..runtime.tuned_blocks import tuned_table
from .expert_case import ExpertCase
from .kernel_cases import Case, cases
from .kernels import DTYPES, KernelOptions, Progress, cuda_or_cpu
from .model_shapes import model_shapes
from .spread import spread
from .stopwatch import Clock, Stint

_OPS = {"decode": "gathered", "prefill": "grouped"}
_GRID = {
    "gathered": {
        "block_n": (4, 8, 16, 32),
        "block_k": (128, 256, 512, 1024),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "grouped": {
        "block_m": (16, 32, 64, 128),
        "block_n": (32, 64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}


class TuningError(OutriderError):
    """No block sizes gave a right result."""


def tune(options: KernelOptions, *, out: Path | None, progress: Progress) -> dict[str, Any]:
    """Measure, write the table, and say where it is and what it holds. Minutes; blocks.

    Raises UsageError without a CUDA device, TuningError where nothing computes rightly.
    """
    options.check()
    device = cuda_or_cpu(options.device if options.device != "cpu" else "cuda")
    arch = 10 * torch.cuda.get_device_capability(device)[0]
    arch += torch.cuda.get_device_capability(device)[1]
    path = out or tuned_table()
    entries: dict[str, Blocks] = {}
    clock = Clock(device)
    for fmt in options.formats:
        for name in options.shapes:
            model = model_shapes()[name]
            experts = ExpertCase(
                model.hidden_size, model.expert_size, fmt, options.arena_bytes, 17, device
            )
            chosen = cases(
                experts,
                [(name, model)],
                impls=("triton",),
                dtype=DTYPES[options.dtype],
                decode_tokens=options.decode_tokens,
                prefill_tokens=options.prefill_tokens,
            )
            for case in chosen:
                if case.op != "linear":
                    continue
                op = _OPS[case.phase]
                key = table_key(op, fmt, model.hidden_size, arch)
                if key not in entries:
                    shipped = block_sizes(op, fmt, model.hidden_size, device=device)
                    entries[key] = fastest(
                        op, key, shipped, lambda one=case: _timed(one, clock), progress=progress
                    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_table(path, entries)
    return {
        "path": str(path),
        "card": torch.cuda.get_device_name(device),
        "entries": sorted(entries),
        "is_verified": False,
    }


def fastest(
    op: str,
    key: str,
    shipped: Blocks,
    seconds: Callable[[], float | None],
    *,
    progress: Progress,
) -> Blocks:
    """The candidate with the shortest time; `seconds` is None where sizes do not run or are wrong.

    The shipped sizes are among the candidates. Raises TuningError where none is right.
    """
    best: tuple[float, Blocks] | None = None
    chosen = [shipped, *candidates(op)]
    for done, blocks in enumerate(chosen):
        progress(f"tuning {key}", done, len(chosen))
        with using_table({key: blocks}):
            taken = seconds()
        if taken is not None and (best is None or taken < best[0]):
            best = taken, blocks
    progress(f"tuning {key}", len(chosen), len(chosen))
    if best is None:
        raise TuningError(f"{key}: no block sizes gave a right result")
    return best[1]


def candidates(op: str) -> Iterator[Blocks]:
    """Sizes worth trying, each once."""
    grid: Mapping[str, tuple[int, ...]] = _GRID[op]
    for values in product(*grid.values()):
        yield Blocks(**dict(zip(grid, values, strict=True)))


def _timed(case: Case, clock: Clock) -> float | None:
    (arm,) = case.arms
    try:
        if not arm.error() <= arm.tolerance:
            return None
        stint = Stint(arm.call, case.num_bytes, clock)
        return spread([stint.seconds() for _ in range(3)]).median
    except (RuntimeError, ValueError):
        # Sizes that the card has no room for, or that a kernel does not take.
        return None
