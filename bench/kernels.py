"""`outrider bench kernels`: every op, format and model size beside a plain read of the same memory.

Results are checked first, and a wrong one gets no speed. Weights are cold: each call takes other
experts of an arena of a gigabyte or more. Reads, dense products and ops are timed in turn.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from ..kernels import native
from ..runtime.errors import InsufficientMemoryError, UsageError
from ..runtime.memory import available_bytes
from ..runtime.sizes import format_bytes
from .environment import Environment, environment
from .expectations import calculated
from .expert_case import ExpertCase
from .kernel_cases import Case, cases
from .model_shapes import Geometry, model_shapes
from .spread import paired_ratio, spread
from .stopwatch import Clock, DenseProduct, PlainRead, Stint, interleave

SHAPES = ("deepseek-moe-16b", "qwen1.5-moe", "mixtral-8x7b", "olmoe-1b-7b")
FORMATS = ("fp32", "bf16", "fp16", "int8", "int4", "nf4")
DEFAULT_FORMATS = ("bf16", "int8", "int4")
OPS = ("expert_mlp", "linear", "combine")
IMPLS = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_ARENA_BYTES = 1 << 30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What to measure. Checked by `check`, which raises UsageError naming what is accepted."""

    shapes: tuple[str, ...] = SHAPES
    formats: tuple[str, ...] = DEFAULT_FORMATS
    ops: tuple[str, ...] = OPS
    impls: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("decode", "prefill")
    dtype: str = "bf16"
    device: str = "cpu"
    arena_bytes: int = MIN_ARENA_BYTES
    decode_tokens: int = 1
    prefill_tokens: int = 256
    repetitions: int = 5
    threads: int | None = None

    def check(self) -> None:
        """Raise UsageError for a name or number that means nothing here."""
        for what, given, accepted in (
            ("--shapes", self.shapes, tuple(model_shapes())),
            ("--formats", self.formats, FORMATS),
            ("--ops", self.ops, OPS),
            ("--impls", self.impls, every_impl(self.device)),
            ("--phases", self.phases, ("decode", "prefill")),
            ("--dtype", (self.dtype,), tuple(DTYPES)),
        ):
            unknown = [name for name in given if name not in accepted]
            if unknown:
                raise UsageError(
                    f"{what} {unknown[0]!r} is unknown; accepted: {', '.join(accepted)}"
                )
        if not self.shapes or not self.formats or not self.ops or not self.phases:
            raise UsageError("nothing to measure: --shapes, --formats, --ops or --phases is empty")
        for what, value in (
            ("--decode-tokens", self.decode_tokens),
            ("--prefill-tokens", self.prefill_tokens),
            ("--repetitions", self.repetitions),
            ("--threads", 1 if self.threads is None else self.threads),
        ):
            if value < 1:
                raise UsageError(f"{what} must be at least 1; got {value}")
        if self.arena_bytes < 1 << 20:
            raise UsageError(f"--arena must be at least 1MiB; got {format_bytes(self.arena_bytes)}")


def bench_kernels(options: KernelOptions, *, progress: Progress) -> dict[str, Any]:
    """Check and time; returns the document. Blocks for seconds a format and size of experts.

    Raises UsageError for options that mean nothing or a device that is not there,
    InsufficientMemoryError where the arena does not fit.
    """
    options.check()
    device = cuda_or_cpu(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    surroundings = environment()
    sizes: dict[tuple[int, int], list[tuple[str, Geometry]]] = {}
    for name in options.shapes:
        model = model_shapes()[name]
        sizes.setdefault((model.hidden_size, model.expert_size), []).append((name, model))
    rows: list[dict[str, Any]] = []
    total = len(sizes) * len(options.formats)
    for done, ((hidden, inner), fmt) in enumerate(product(sizes, options.formats)):
        progress("checking and timing", done, total)
        models = sizes[hidden, inner]
        least = max(model.top_k for _, model in models) + 1
        experts = ExpertCase(hidden, inner, fmt, options.arena_bytes, least, device)
        _check_memory(experts)
        rows += _measure(experts, models, options, surroundings)
        del experts
        gc.collect()
    progress("checking and timing", total, total)
    return {
        "environment": surroundings.ended().as_dict(),
        "device": _device_name(device),
        "isa": native.isa() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "options": asdict(options),
        "yardsticks": (
            "plain read: every byte of the same arena once, one stream a thread; dense product: "
            "torch's linear at the prefill's rows and an expert's gate and up"
        ),
        "rows": rows,
    }


def every_impl(device: str) -> tuple[str, ...]:
    """What can be measured on a device."""
    return IMPLS["cuda" if device.startswith("cuda") else "cpu"]


def wrong_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose result is out of tolerance, and which therefore have no speed."""
    return [row for row in document["rows"] if not row["is_correct"]]


def _measure(
    experts: ExpertCase,
    models: Sequence[tuple[str, Geometry]],
    options: KernelOptions,
    surroundings: Environment,
) -> list[dict[str, Any]]:
    clock = Clock(experts.device)
    default = ("triton", "torch") if experts.device.type == "cuda" else ("cpu", "torch")
    rows = []
    with torch.inference_mode():
        read = PlainRead(experts.arena, clock)
        for case in cases(
            experts,
            models,
            impls=options.impls or default,
            dtype=DTYPES[options.dtype],
            decode_tokens=options.decode_tokens,
            prefill_tokens=options.prefill_tokens,
        ):
            if case.op in options.ops and case.phase in options.phases:
                rows += _rows(case, experts, read, clock, options, surroundings)
    return rows


def _rows(
    case: Case,
    experts: ExpertCase,
    read: PlainRead,
    clock: Clock,
    options: KernelOptions,
    surroundings: Environment,
) -> list[dict[str, Any]]:
    errors = {arm.impl: arm.error() for arm in case.arms}
    right = [arm for arm in case.arms if errors[arm.impl] <= arm.tolerance]
    stints = [Stint(arm.call, case.num_bytes, clock) for arm in right]
    dense: dict[str, DenseProduct] = {}
    if case.dense is not None and right:
        dense = {
            name: DenseProduct(case.dense, dtype, clock)
            for name, dtype in DTYPES.items()
            if name in {"fp32", options.dtype}
        }
    measures = [read.rate, *(one.rate for one in dense.values()), *(s.seconds for s in stints)]
    values = interleave(measures, options.repetitions) if right else []
    reads = values[0] if values else []
    rates = dict(zip(dense, values[1 : 1 + len(dense)], strict=True)) if values else {}
    taken = dict(zip((arm.impl for arm in right), values[1 + len(dense) :], strict=True))
    return [
        {
            "op": case.op,
            "impl": arm.impl,
            "format": case.fmt,
            "shape": case.shape,
            "phase": case.phase,
            "tokens": case.num_tokens,
            "activations": options.dtype,
            "error": errors[arm.impl],
            "tolerance": arm.tolerance,
            "is_correct": arm.impl in taken,
            **_speed(case, taken.get(arm.impl), reads, rates),
            "expected": calculated(case, arm.impl),
            "arena_bytes": experts.num_slots * experts.block_bytes,
            "weights": "activations only, warm" if case.op == "combine" else "cold",
            **surroundings.stamp(),
        }
        for arm in case.arms
    ]


def _speed(
    case: Case,
    seconds: list[float] | None,
    reads: list[float],
    rates: dict[str, list[float]],
) -> dict[str, Any]:
    if seconds is None:
        names = ("gb_per_s", "share_of_read", "read_gb_per_s", "microseconds", "gflop_per_s")
        return dict.fromkeys((*names, "share_of_matmul", "matmul_gflop_per_s", "spread"))
    bandwidths = [case.num_bytes / one for one in seconds]
    speeds = [case.flops / one for one in seconds]
    share = paired_ratio(bandwidths, reads)
    return {
        "gb_per_s": spread(bandwidths).median / 1e9,
        "share_of_read": share.median,
        "read_gb_per_s": spread(reads).median / 1e9,
        "microseconds": spread(seconds).median * 1e6,
        "gflop_per_s": spread(speeds).median / 1e9,
        "share_of_matmul": {name: paired_ratio(speeds, of).median for name, of in rates.items()},
        "matmul_gflop_per_s": {name: spread(of).median / 1e9 for name, of in rates.items()},
        "spread": share.as_dict(),
    }


def cuda_or_cpu(name: str) -> torch.device:
    """The device, or UsageError where it is unknown or not there."""
    if name == "cpu":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise UsageError(f"--device {name!r} is unknown; accepted: cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: PyTorch {torch.__version__} finds no CUDA device here; without one "
            "the Triton kernels are interpreted and compiled by the tests, never timed "
            "(--expected prints what is calculated for a card)"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _check_memory(experts: ExpertCase) -> None:
    needed = experts.num_slots * experts.block_bytes
    if experts.device.type == "cuda":
        free = torch.cuda.mem_get_info(experts.device)[0]
    else:
        free = available_bytes()
    if needed > free:
        raise InsufficientMemoryError(
            f"an arena of {format_bytes(needed)} does not fit the {format_bytes(free)} that are "
            "free; a smaller one with --arena is measured from caches in part"
        )
