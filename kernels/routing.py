"""Which rows go to which slot: assignments sorted by slot, cut into tiles for a grouped matmul.

Knows assignments and slots only. Everything stays on the device: no host sync, so the number of
tiles is an upper bound and the unused ones say slot -1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """N assignments sorted by slot; tiles of at most `block_rows` rows of one slot.

    order [N] int64: assignment at each sorted row (stable: a slot's rows keep the call's order).
    tile_slots [P] int64: a tile's slot, -1 for the unused ones at the end.
    tile_starts, tile_ends [P] int64: its sorted rows.
    """

    order: Tensor
    tile_slots: Tensor
    tile_starts: Tensor
    tile_ends: Tensor
    block_rows: int


def max_tiles(num_assignments: int, num_slots: int, *, block_rows: int) -> int:
    """Most tiles that any routing of so many assignments over so many slots can need."""
    used = min(num_assignments, num_slots)
    return used + (num_assignments - used) // block_rows


def plan_routing(slot_ids: Tensor, num_slots: int, *, block_rows: int) -> RoutingPlan:
    """Plan for slot_ids [N] (values 0..num_slots - 1), on their device, without a host sync."""
    slots = slot_ids.long()
    num_assignments = slots.shape[0]
    order = torch.argsort(slots, stable=True)
    counts = torch.zeros(num_slots, dtype=torch.int64, device=slots.device)
    counts.scatter_add_(0, slots, torch.ones_like(slots))
    row_ends = counts.cumsum(0)  # [S]
    tiles = (counts + block_rows - 1) // block_rows
    tile_ends = tiles.cumsum(0)  # [S]: tiles up to and with each slot
    tile = torch.arange(
        max_tiles(num_assignments, num_slots, block_rows=block_rows), device=slots.device
    )
    slot = torch.searchsorted(tile_ends, tile, right=True)  # num_slots for the unused tiles
    is_used = slot < num_slots
    slot = slot.clamp(max=num_slots - 1)
    within = tile - (tile_ends - tiles)[slot]
    starts = (row_ends - counts)[slot] + within * block_rows
    ends = torch.minimum(starts + block_rows, row_ends[slot])
    return RoutingPlan(
        order=order,
        tile_slots=torch.where(is_used, slot, -1),
        tile_starts=torch.where(is_used, starts, 0),
        tile_ends=torch.where(is_used, ends, 0),
        block_rows=block_rows,
    )


def one_slot(num_rows: int, *, block_rows: int, device: torch.device) -> RoutingPlan:
    """The plan of a dense product: rows in their own order, all by slot 0."""
    order = torch.arange(num_rows, device=device)
    starts = order[::block_rows].contiguous()
    return RoutingPlan(
        order=order,
        tile_slots=torch.zeros_like(starts),
        tile_starts=starts,
        tile_ends=(starts + block_rows).clamp(max=num_rows),
        block_rows=block_rows,
    )
