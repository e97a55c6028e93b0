"""A collecting pass on a device: how many traces an hour at most, and with nothing overlapped.

Arithmetic over a device and a model's shape, like `fit`; knows no routing and no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .fit import Fit

BATCH_TRACES = 8
TRACE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class CollectingPass:
    """One forward pass over `traces` samples of `tokens` tokens each, through the model of `fit`.

    Experts are taken to be chosen evenly, so that nearly all are touched; each missing one is
    brought once a pass. No time is counted for text, hooks and writing.
    """

    fit: Fit
    traces: int = BATCH_TRACES
    tokens: int = TRACE_TOKENS

    @property
    def touched(self) -> float:
        """Share of the experts that some token of the pass uses."""
        shape = self.fit.geometry
        return 1.0 - (1.0 - shape.top_k / shape.num_experts) ** (self.traces * self.tokens)

    @property
    def device_s(self) -> float:
        """The longer of reading every touched weight once, and of two operations a weight a
        token.
        """
        fit, shape = self.fit, self.fit.geometry
        read = 2.0 * shape.active_dense_parameters + self.touched * fit.experts_bytes
        active = shape.active_dense_parameters
        active += shape.moe_layers * shape.top_k * shape.expert_parameters
        operations = 2.0 * active * self.traces * self.tokens
        return max(read / fit.device.memory_bytes_per_s, operations / fit.device.flop_per_s)

    @property
    def link_s(self) -> float:
        """Bringing the touched experts that are not resident."""
        missing = self.touched * (1.0 - self.fit.share) * self.fit.experts_bytes
        return missing / self.fit.device.link_bytes_per_s

    @property
    def overhead_s(self) -> float:
        """The profile's launches and read-backs."""
        shape, device = self.fit.geometry, self.fit.device
        layers = shape.dense_layers + shape.moe_layers
        return 1e-6 * (
            layers * device.layer_us + shape.moe_layers * device.sync_us + device.token_us
        )

    @property
    def bound(self) -> float:
        """Traces an hour where copies and arithmetic overlap perfectly and nothing else is done."""
        return 3600.0 * self.traces / max(self.device_s, self.link_s)

    @property
    def serial(self) -> float:
        """Traces an hour where nothing overlaps."""
        return 3600.0 * self.traces / (self.device_s + self.link_s + self.overhead_s)


def figures(fit: Fit) -> dict[str, float | int | None]:
    """For a row of `--fit`; speeds are None where the model does not run."""
    one, runs = CollectingPass(fit), fit.num_resident > 0
    return {
        "batch_traces": one.traces,
        "trace_tokens": one.tokens,
        "traces_per_hour": one.serial if runs else None,
        "roofline_traces_per_hour": one.bound if runs else None,
    }
