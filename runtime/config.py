"""The engine's options: their accepted values, defaults, and how the four layers settle them.

Knows no model: sizes and names are resolved against one by the engine. Imports no torch unless an
option asks for a GPU.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import FieldError, UsageError
from .experts.eviction import EVICTIONS
from .limits import Limit, check_bool, check_integer, refusal
from .provenance import DEFAULT, Provenance, gather
from .sizes import ExpertBudget, parse_budget

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4", "nf4")

# What an option of a closed set accepts. "auto" for format and dtype is the checkpoint's own.
CHOICES: dict[str, tuple[str, ...]] = {
    "format": ("auto", *FORMATS),
    "dense_format": ("same", "int8", "int4"),
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "prefetch": ("auto", "on", "off"),
    "eviction": ("auto", *EVICTIONS),
    "on_miss": ("fetch", "host", "auto"),
}
NUM_THREADS = Limit(1, 1024)

# Known by name, but only to a replay that can see the future.
_REPLAY_ONLY = {"eviction": "belady", "predictor": "oracle"}
_DEVICE = re.compile(r"auto|cpu|cuda(?::([0-9]{1,3}))?")
_REVISION = re.compile(r"[A-Za-z0-9._/-]{1,256}")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine may be told, checked on construction; INTERFACES section 1.

    `expert_memory` and `host_memory` are sizes as `sizes.parse_budget` reads them. `predictor` is a
    name or a folder made by `outrider train`. `eviction` auto is by forecast where a predictor
    serves to read ahead, else `DEFAULT_EVICTION`. `device` auto is the first GPU that torch and
    Triton can use, else the CPU.
    `num_threads` None leaves torch's own choice. `profile` is a folder for traces of the run.

    Raises `FieldError` naming the option, the value and what is accepted.
    """

    expert_memory: str | int = "auto"
    host_memory: str | int = "auto"
    format: str = "auto"
    dense_format: str = "same"
    dtype: str = "auto"
    predictor: str | Path = "auto"
    prefetch: str = "auto"
    eviction: str = "auto"
    on_miss: str = "fetch"
    verify_on_load: bool = False
    device: str = "auto"
    revision: str | None = None
    num_threads: int | None = None
    profile: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("expert_memory", "host_memory"):
            try:
                parse_budget(getattr(self, name))
            except UsageError as error:
                raise FieldError(name, f"{name}: {error}") from None
        for name, accepted in CHOICES.items():
            _check_choice(name, getattr(self, name), accepted)
        _check_predictor(self.predictor)
        check_bool("verify_on_load", self.verify_on_load)
        if self.revision is not None and (
            not isinstance(self.revision, str) or not _REVISION.fullmatch(self.revision)
        ):
            raise refusal("revision", self.revision, "a branch, a tag or a commit")
        if self.num_threads is not None:
            check_integer("num_threads", self.num_threads, limit=NUM_THREADS)
        if self.profile is not None and not isinstance(self.profile, (str, Path)):
            raise refusal("profile", self.profile, "a folder")
        _check_device(self.device)
        _check_on_miss(self.on_miss, self.device)

    @property
    def is_exact(self) -> bool:
        """Whether tokens are those of fetching every miss, whatever is predicted and resident."""
        return self.on_miss == "fetch"

    @property
    def expert_budget(self) -> ExpertBudget:
        """`expert_memory`, parsed."""
        return parse_budget(self.expert_memory)

    @property
    def host_budget(self) -> ExpertBudget:
        """`host_memory`, parsed."""
        return parse_budget(self.host_memory)


OPTION_NAMES = tuple(item.name for item in fields(EngineConfig))


def resolve_config(
    cli: Mapping[str, object],
    env: Mapping[str, str],
    file: Path | None = None,
    *,
    other_names: Collection[str] = (),
) -> tuple[EngineConfig, dict[str, Provenance]]:
    """The engine's configuration and where each of its values came from, for `--print-config`.

    Command line > `OUTRIDER_*` environment > `file` (YAML) > default, as `provenance.gather`.
    `other_names` are options of the same command that are not the engine's. An error about a value
    says which flag, variable or line of the file gave it.
    """
    given = gather(OPTION_NAMES, cli, env, file, other_names=other_names)
    sources = {name: given[name][1] if name in given else DEFAULT for name in OPTION_NAMES}
    try:
        values = {name: _typed(name, value) for name, (value, _) in given.items()}
        return EngineConfig(**values), sources
    except FieldError as error:
        where = sources[error.field].where
        raise FieldError(error.field, f"{error} (from {where})") from None


def cuda_device_count() -> int:
    """CUDA devices that torch can use; imports torch, which takes seconds."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _typed(name: str, value: object) -> Any:
    """What a string of the environment or the file means for an option that is not a string."""
    if isinstance(value, list):
        raise refusal(name, value, "a single value")
    if isinstance(value, str):
        if name == "verify_on_load":
            if value.lower() not in (*_TRUE, *_FALSE):
                raise refusal(name, value, f"one of {', '.join((*_TRUE, *_FALSE))}")
            return value.lower() in _TRUE
        if name == "num_threads" and re.fullmatch(r"[0-9]{1,9}", value):
            return int(value)
    return value


def _check_choice(name: str, value: object, accepted: Collection[str]) -> None:
    if value in accepted:
        return
    if value == _REPLAY_ONLY.get(name):
        raise FieldError(
            name,
            f"{name} {value!r} needs to know the future and works in replay only: accepted here is "
            f"one of {', '.join(accepted)}",
        )
    raise refusal(name, value, f"one of {', '.join(accepted)}")


def _check_predictor(value: object) -> None:
    # Here, since it brings numpy, which a command that only prints its help does without.
    from ..predictors.base import NAMES

    names = ("auto", "none", *(name for name in NAMES if name != _REPLAY_ONLY["predictor"]))
    is_folder = isinstance(value, (str, Path)) and value != "" and Path(value).is_dir()
    if value not in names and not is_folder:
        _check_choice("predictor", value, (*names, "or a folder made by outrider train"))


def _check_device(device: object) -> None:
    match = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if match is None:
        raise refusal("device", device, "auto, cpu, cuda or cuda:N")
    if match[0].startswith("cuda"):
        count = cuda_device_count()
        if int(match[1] or 0) >= count:
            raise FieldError(
                "device",
                f"device is {device!r} and this machine has {count or 'no'} CUDA devices that "
                "torch can use: accepted here is "
                + (f"cpu, cuda:0 to cuda:{count - 1}" if count else "cpu"),
            )


def _check_on_miss(on_miss: str, device: str) -> None:
    if on_miss == "fetch" or device.startswith("cuda"):
        return
    if device == "cpu" or cuda_device_count() == 0:
        reason = "the device is the CPU" if device == "cpu" else "this machine has no GPU"
        raise FieldError(
            "on_miss",
            f"on_miss is {on_miss!r}, which computes missed experts on the CPU beside the GPU, and "
            f"{reason}: accepted here is fetch",
        )
