"""Will it run on a card, and how fast at best: arithmetic over a device and a model's shape.

Knows no routing: what share of look-ups finds its expert resident is given, or taken to be the
share of the experts that fits, as if routing had neither habits nor locality.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import InsufficientMemoryError
from ..runtime.sizes import format_bytes
from .devices import Device, devices
from .environment import environment
from .model_shapes import Geometry, step_times
from .passes import figures

FORMATS = ("bf16", "int8", "int4")
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Fit:
    """One model on one device: experts in `format`, all else in bf16, batch 1."""

    device: Device
    geometry: Geometry
    format: str
    context_tokens: int = CONTEXT_TOKENS

    @property
    def dense_bytes(self) -> float:
        """Weights that are always on the device."""
        return 2.0 * self.geometry.dense_parameters

    @property
    def kv_bytes(self) -> float:
        """KV cache of one sequence."""
        return self.geometry.kv_bytes(self.context_tokens)

    @property
    def room_bytes(self) -> float:
        """Left for experts; negative where not even the rest fits."""
        return self.device.room_bytes(dense_bytes=self.dense_bytes, kv_bytes=self.kv_bytes)

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return self.geometry.moe_layers * self.geometry.num_experts

    @property
    def experts_bytes(self) -> float:
        """Of all routed experts."""
        return self.num_experts * self.geometry.expert_bytes(self.format)

    @property
    def num_resident(self) -> int:
        """Experts that have room, at most all; 0 where it does not run."""
        each = self.geometry.expert_bytes(self.format)
        return max(0, min(self.num_experts, int(self.room_bytes // each)))

    @property
    def share(self) -> float:
        """Of the experts, resident."""
        return self.num_resident / self.num_experts

    @property
    def routed_bytes(self) -> float:
        """Bytes of the experts that one token uses."""
        shape = self.geometry
        return shape.moe_layers * shape.top_k * shape.expert_bytes(self.format)

    @property
    def read_s(self) -> float:
        """Reading every weight that one token uses, and its cache, at the memory's bandwidth."""
        active = 2.0 * self.geometry.active_dense_parameters + self.routed_bytes
        return active / self.device.memory_bytes_per_s

    def miss_s(self, hit_rate: float) -> float:
        """Link time of a token's missing experts, where `hit_rate` of look-ups are resident."""
        return (1.0 - hit_rate) * self.routed_bytes / self.device.link_bytes_per_s

    def bound(self, hit_rate: float) -> float:
        """Tokens/s where reads and arithmetic overlap perfectly: ANCHORS section 5's overlap."""
        return 1.0 / max(self.read_s, self.miss_s(hit_rate))

    def serial(self, hit_rate: float) -> float:
        """Tokens/s where nothing overlaps, without launches and other overheads."""
        return 1.0 / (self.read_s + self.miss_s(hit_rate))

    @property
    def step_s(self) -> float:
        """A resident token's seconds with the profile's launches and read-backs."""
        times = step_times(self.geometry, self.device, fmt=self.format)
        layers, experts = self.geometry.moe_layers, self.geometry.top_k
        return times.begin_s + layers * (times.layer_s + experts * times.expert_s) + times.end_s

    def require(self) -> None:
        """InsufficientMemoryError, with sizes, where not one expert has room."""
        if self.num_resident:
            return
        device = self.device
        raise InsufficientMemoryError(
            f"{self.geometry.title} does not run on {device.title}: its dense weights take "
            f"{format_bytes(int(self.dense_bytes))}, the KV cache of {self.context_tokens} tokens "
            f"{format_bytes(int(self.kv_bytes))}, the reserve "
            f"{format_bytes(int(1e9 * device.reserve_gb))}, and one expert in {self.format} "
            f"{format_bytes(int(self.geometry.expert_bytes(self.format)))}: choose a smaller "
            "--format or --context-tokens, or another --device"
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON; speeds are None where it does not run."""
        runs, share = self.num_resident > 0, self.share
        link_s = self.miss_s(share)
        return {
            "simulated": True,
            "device": self.device.title,
            "model_shape": self.geometry.title,
            "format": self.format,
            "context_tokens": self.context_tokens,
            "runs": runs,
            "dense_bytes": self.dense_bytes,
            "kv_bytes": self.kv_bytes,
            "room_bytes": self.room_bytes,
            "expert_bytes": self.geometry.expert_bytes(self.format),
            "experts_bytes": self.experts_bytes,
            "experts": self.num_experts,
            "resident_experts": self.num_resident,
            "resident_share": share,
            "routed_bytes_per_token": self.routed_bytes,
            "device_s_per_token": self.read_s,
            "resident_roofline_tokens_per_second": 1.0 / self.read_s,
            "roofline_tokens_per_second": self.bound(share) if runs else None,
            "serial_tokens_per_second": self.serial(share) if runs else None,
            "on_demand_tokens_per_second": 1.0 / (self.step_s + link_s) if runs else None,
            **figures(self),
        }


def bench_fit(
    geometry: Geometry,
    chosen: Sequence[Device] = (),
    *,
    formats: Sequence[str] = FORMATS,
    context_tokens: int = CONTEXT_TOKENS,
) -> dict[str, Any]:
    """The document of `--fit`: a row a device and format, all known devices if none is chosen."""
    rows = [
        Fit(device, geometry, fmt, context_tokens).as_dict()
        for device in chosen or devices().values()
        for fmt in formats
    ]
    around = environment()
    return {
        "bench": "fit",
        "simulated": True,
        "environment": around.ended().as_dict(),
        "settings": {
            "model_shape": geometry.title,
            "source": geometry.source,
            "context_tokens": context_tokens,
            "hit_rate": "the share of the experts that fits: routing without locality",
        },
        "rows": rows,
    }
