"""The fastest that a machine could decode, from its bandwidths and the fewest bytes to move.

1 / max(active bytes / plain read, bytes missed / link), where the bytes missed are those of the
better of a global and a per-layer LRU of that size on the same routing, never an arm's own. What
overlaps perfectly takes the longer of the two times, so no arm can be ahead of it by prefetching;
one can by a better eviction than LRU.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pass:
    """The routing of one forward pass: per MoE layer the distinct experts, ascending."""

    is_decode: bool
    layers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Roofline:
    """The bound of one arm. All bytes are per decoded token."""

    active_bytes: float
    missed_bytes: float
    read_bytes_per_s: float
    link_bytes_per_s: float

    @property
    def tokens_per_second(self) -> float:
        """The bound itself."""
        compute_s = self.active_bytes / self.read_bytes_per_s
        return 1.0 / max(compute_s, self.missed_bytes / self.link_bytes_per_s)


def lru_misses(passes: Sequence[Pass], *, num_slots: int, num_experts: int, is_warm: bool) -> int:
    """Look-ups of the decode passes that the better LRU of `num_slots` misses.

    `is_warm` starts from what the same passes leave behind, else from nothing. A pass walks the
    layers in order and looks each distinct expert up once.
    """
    num_layers = max((len(one.layers) for one in passes), default=0)
    if num_slots >= num_layers * num_experts and is_warm:
        return 0
    quotas = [
        (layer + 1) * num_slots // num_layers - layer * num_slots // num_layers
        for layer in range(num_layers)
    ]
    globally = _misses(passes, [num_slots], is_warm=is_warm)
    return min(globally, _misses(passes, quotas, is_warm=is_warm))


def _misses(passes: Sequence[Pass], quotas: list[int], *, is_warm: bool) -> int:
    held: list[OrderedDict[tuple[int, int], None]] = [OrderedDict() for _ in quotas]
    misses = 0
    for is_counted in (False, True) if is_warm else (True,):
        for one in passes:
            for layer, experts in enumerate(one.layers):
                part = layer if len(quotas) > 1 else 0
                for expert in experts:
                    is_hit = _use(held[part], (layer, expert), quotas[part])
                    misses += is_counted and one.is_decode and not is_hit
    return misses


def _use(held: OrderedDict[tuple[int, int], None], key: tuple[int, int], quota: int) -> bool:
    if key in held:
        held.move_to_end(key)
        return True
    if quota:
        if len(held) >= quota:
            held.popitem(last=False)
        held[key] = None
    return False
