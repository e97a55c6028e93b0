"""Which configurations the simulator is held against: three to calibrate on, others it never saw.

Knows names and options only.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Configuration:
    """One run: a checkpoint (None: the built-in), engine options, and a limit on the disk's speed.

    `predictor` is asked where there is prefetch; `throttle_bytes_per_s` None leaves the disk as it
    is.
    """

    model: str | None
    budget: str
    format: str = "auto"
    eviction: str = "layer-lfu"
    prefetch: str = "off"
    predictor: str = "lookahead"
    throttle_bytes_per_s: float | None = None

    @property
    def engine(self) -> dict[str, Any]:
        """Options of the engine."""
        return {
            "expert_memory": self.budget,
            "format": self.format,
            "eviction": self.eviction,
            "prefetch": self.prefetch,
            "predictor": "none" if self.prefetch == "off" else self.predictor,
            "num_threads": 1,
        }

    @property
    def name(self) -> str:
        """What it is called in tables."""
        parts = ["nano" if self.model is None else "geometry", self.budget]
        if self.format != "auto":
            parts.append(self.format)
        if self.eviction != "layer-lfu":
            parts.append(self.eviction)
        parts.append("on demand" if self.prefetch == "off" else self.predictor)
        if self.throttle_bytes_per_s is not None:
            parts.append(f"disk {self.throttle_bytes_per_s / 1e6:g} MB/s")
        return ", ".join(parts)


AHEAD: dict[str, Any] = {"prefetch": "on", "predictor": "ensemble"}


def calibrated_on(geometry: str | None) -> list[Configuration]:
    """The three: on demand, reading ahead, and large experts, or else none read at all."""
    third = Configuration(None, "all") if geometry is None else Configuration(geometry, "25%")
    return [Configuration(None, "25%"), Configuration(None, "25%", **AHEAD), third]


def unseen(geometry: str | None) -> list[Configuration]:
    """Other budgets, policies, formats, predictors and disks, with and without forecasts."""
    found = [
        Configuration(None, "75%"),
        Configuration(None, "50%"),
        Configuration(None, "10%"),
        Configuration(None, "25%", eviction="lru"),
        Configuration(None, "50%", eviction="layer-lru"),
        Configuration(None, "25%", format="int8"),
        Configuration(None, "50%", format="int8"),
        Configuration(None, "25%", format="int4"),
        Configuration(None, "25%", throttle_bytes_per_s=50e6),
        Configuration(None, "50%", throttle_bytes_per_s=50e6),
        Configuration(None, "25%", throttle_bytes_per_s=200e6),
        Configuration(None, "50%", **AHEAD),
        Configuration(None, "10%", **AHEAD),
        Configuration(None, "25%", format="int8", **AHEAD),
        Configuration(None, "50%", throttle_bytes_per_s=100e6, **AHEAD),
        Configuration(None, "50%", prefetch="on"),
        Configuration(None, "25%", prefetch="on"),
        Configuration(None, "10%", prefetch="on"),
        Configuration(None, "25%", prefetch="on", throttle_bytes_per_s=100e6),
    ]
    if geometry is not None:
        found += [
            Configuration(None, "all"),
            Configuration(geometry, "50%"),
            Configuration(geometry, "10%"),
            Configuration(geometry, "25%", throttle_bytes_per_s=400e6),
            Configuration(geometry, "25%", prefetch="on"),
        ]
    return found
