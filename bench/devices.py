"""Device profiles for simulation, each figure with its source. Knows no model."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from ..runtime.errors import UsageError

GIB = 2**30
ASSUMED = "assumed"


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device: memory, link and the times that are neither arithmetic nor transfer.

    `source` has an entry for every figure but `memory_gib`; one that begins with "assumed" was
    measured by nobody. See devices.toml for what each means.
    """

    title: str
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    bf16_tflops: float
    reserve_gb: float
    layer_us: float
    token_us: float
    sync_us: float
    latency_us: float
    source: dict[str, str]

    @property
    def memory_bytes_per_s(self) -> float:
        """Plain read."""
        return 1e9 * self.memory_gb_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """What experts come over: PCIe from pinned memory, or a disk."""
        return 1e9 * self.link_gb_per_s

    @property
    def flop_per_s(self) -> float:
        """Dense matrix products in bf16."""
        return 1e12 * self.bf16_tflops

    def room_bytes(self, *, dense_bytes: float, kv_bytes: float) -> float:
        """Bytes left for experts; negative where not even the rest fits."""
        return GIB * self.memory_gib - 1e9 * self.reserve_gb - dense_bytes - kv_bytes

    def as_dict(self) -> dict[str, Any]:
        """The profile with its sources, for JSON."""
        return msgspec.to_builtins(self)


@cache
def devices() -> dict[str, Device]:
    """All profiles by name."""
    text = files("outrider.bench").joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: msgspec.convert(one, Device) for name, one in tomllib.loads(text).items()}


def find_device(name: str) -> Device:
    """The profile called `name`; UsageError lists the known ones."""
    found = devices().get(name)
    if found is None:
        raise UsageError(f"device {name!r} has no profile; known ones: {', '.join(devices())}")
    return found
