"""The arms of `bench decode` by name: what serves each, and what that is told."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import UsageError
from ..runtime.models.loading import resolve_folder
from .fence import Fence
from .records import External, Subject

LLAMA_RESIDENT = "llama.cpp-resident"
NAMES = (
    "resident", "eager", "on-demand", "prefetch", "oracle", "accelerate", "llama.cpp",
    LLAMA_RESIDENT,
)  # fmt: skip
# `prefetch:statistics` is prefetching with that predictor.
_WITH_PREDICTOR = "prefetch:"
_EXTERNAL = frozenset({"accelerate", "llama.cpp", LLAMA_RESIDENT})
# Sums in another order, so that in bf16 a near-tie may go the other way.
_OTHERWISE_ROUNDED = _EXTERNAL | {"eager"}
# The same whatever the budget, and outside of every limit.
_RESIDENT = frozenset({"resident", "eager", LLAMA_RESIDENT})
# What transformers needs beside its weights, and twice the largest layer that it brings back.
_TRANSFORMERS_BYTES = 1 << 30
_LEAST_BYTES = 256 << 20


class Options(Protocol):
    """What arms are told of a run."""

    @property
    def model(self) -> str | None: ...
    @property
    def store(self) -> str | None: ...
    @property
    def engine(self) -> Mapping[str, Any]: ...
    @property
    def llama(self) -> tuple[str, str] | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def memory_limit(self) -> int | str | None: ...
    @property
    def link_bytes_per_s(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: the kind of worker that serves it, and the arguments that it is made with."""

    kind: str
    arguments: dict[str, Any]
    is_external: bool = False
    is_resident: bool = False


def rounds_otherwise(name: str) -> bool:
    """Whether the arm's arithmetic is another, so that its tokens need not all be the same."""
    return name in _OTHERWISE_ROUNDED


def is_external(name: str) -> bool:
    """Whether the arm is another system."""
    return name in _EXTERNAL


def is_resident(name: str) -> bool:
    """Whether the arm holds everything, so that budgets and limits do not concern it."""
    return name in _RESIDENT


def check(names: Sequence[str], *, has_llama: bool) -> None:
    """Raise UsageError for arms that are unknown or cannot be run like this."""
    unknown = [name for name in names if name not in NAMES and not _predictor(name)]
    if unknown or not names:
        raise UsageError(
            f"arms: {', '.join(unknown) or 'none'}; known ones: {', '.join(NAMES)} and "
            f"{_WITH_PREDICTOR}PREDICTOR"
        )
    if all(rounds_otherwise(name) for name in names):
        raise UsageError(
            "arms: at least one of outrider's own by its kernels, to whose tokens others are held"
        )
    if not has_llama and any(name.startswith("llama.cpp") for name in names):
        raise UsageError(
            "arms: llama.cpp needs --llama-python, a Python that has llama-cpp-python, and "
            "--gguf, the same weights (outrider bench make-gguf writes them)"
        )


def arm(name: str, budget: str, options: Options) -> Arm:
    """The arm called `name` at one budget. `name` has passed `check`."""
    if name == "accelerate":
        dtype = options.engine.get("dtype", "auto")
        return Arm(name, {"model": options.model, "dtype": dtype}, is_external=True)
    if name.startswith("llama.cpp"):
        assert options.llama is not None
        python, file = options.llama
        arguments = {
            "python": python,
            "file": file,
            "context": options.prompt_tokens + options.num_tokens + 8,
        }
        return Arm("llama.cpp", arguments, is_external=True, is_resident=name == LLAMA_RESIDENT)
    config = {**options.engine, "expert_memory": budget}
    more: dict[str, Any] = {}
    if name in ("resident", "eager"):
        config |= {"expert_memory": "all", "prefetch": "off"}
        more = {"is_filled": True, "is_eager": name == "eager"}
    elif name == "on-demand":
        config |= {"prefetch": "off"}
    elif name == "oracle":
        config |= {"predictor": "frequent"}  # any that needs nothing: the arm puts its own in place
        more = {"is_foretold": True}
    elif name.startswith(_WITH_PREDICTOR):
        config |= {"predictor": _predictor(name)}
    if name not in _RESIDENT:
        more["link_bytes_per_s"] = options.link_bytes_per_s
    arguments = {"model": options.model, "store": options.store, "options": config, **more}
    return Arm("engine", arguments, is_resident=name in _RESIDENT)


def fence(name: str, arm: Arm, options: Options, *, within: ExitStack) -> Fence | None:
    """A fence around an arm that goes away with `within`; None where nothing is limited.

    Another system's reads are throttled by it; ours throttle themselves (`throttle`).
    """
    rate = options.link_bytes_per_s if arm.is_external else None
    if arm.is_resident or (options.memory_limit is None and rate is None):
        return None
    made = within.enter_context(Fence(f"outrider-{os.getpid()}-{name}"))
    if rate is not None:
        file = arm.arguments.get("file")
        folder = resolve_folder(options.model) if file is None else Path(file).parent
        made.limit_reads(rate, folder=folder)
    return made


def external_arguments(arm: Arm, like: Subject, limit: int | None) -> dict[str, Any]:
    """What an external arm is told beside its own: `like` is ours at the same budget."""
    if arm.kind == "llama.cpp":
        return {"threads": like.num_threads}
    held = like.budget_bytes + like.dense_bytes
    if limit is not None:
        held = max(_LEAST_BYTES, limit - _beside_weights(like))
    return {"memory_bytes": held}


def external_bytes(like: Subject, limit: int | None) -> int:
    """What transformers with accelerate holds at most, beside an arm of ours that is `like`."""
    held = like.budget_bytes + like.dense_bytes + _beside_weights(like)
    return held if limit is None else limit


def _beside_weights(like: Subject) -> int:
    return _TRANSFORMERS_BYTES + 2 * like.num_experts * like.expert_bytes


def subject(name: str, external: External, like: Subject) -> Subject:
    """What an external arm runs, for its row: our own subject's sizes under its name."""
    fmt = Path(external.files[0]).stem if name.startswith("llama.cpp") else like.dtype
    return replace(
        like,
        format=fmt,
        predictor="none",
        prefetch="off",
        eviction="none" if name == LLAMA_RESIDENT else "its own",
        load_s=external.load_s,
        files=external.files,
    )


def _predictor(name: str) -> str:
    return name.removeprefix(_WITH_PREDICTOR) if name.startswith(_WITH_PREDICTOR) else ""
