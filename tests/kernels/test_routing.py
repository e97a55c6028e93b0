"""Where a grouped product's rows go: every assignment once, in tiles of one slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.kernels.routing import max_tiles, one_slot, plan_routing


def _rows_by_slot(plan):
    """Slot of each sorted row, as the tiles say it; fails where tiles overlap or leave a gap."""
    slots = torch.full((plan.order.shape[0],), -1)
    tiles = zip(
        plan.tile_slots.tolist(), plan.tile_starts.tolist(), plan.tile_ends.tolist(), strict=True
    )
    for slot, start, end in tiles:
        if slot < 0:
            continue
        assert 0 < end - start <= plan.block_rows
        assert (slots[start:end] == -1).all()
        slots[start:end] = slot
    assert (slots >= 0).all()
    return slots


@settings(deadline=None)
@given(
    num_slots=st.integers(1, 9),
    block_rows=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_every_assignment_lies_in_one_tile_of_its_slot(num_slots, block_rows, data):
    ids = data.draw(st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=60))
    slot_ids = torch.tensor(ids)
    plan = plan_routing(slot_ids, num_slots, block_rows=block_rows)
    assert sorted(plan.order.tolist()) == list(range(len(ids)))
    assert torch.equal(_rows_by_slot(plan), slot_ids[plan.order])
    for slot in set(ids):
        rows = plan.order[slot_ids[plan.order] == slot]
        assert rows.tolist() == sorted(rows.tolist())


@pytest.mark.parametrize("used", [1, 4])
def test_the_bound_on_tiles_is_reached(used):
    # One row in each slot but one, which takes the rest: every last tile holds one row.
    ids = torch.tensor([*range(used - 1), *[used - 1] * (2 * 16 + 1)])
    plan = plan_routing(ids, 4, block_rows=16)
    assert (plan.tile_slots >= 0).sum() == max_tiles(len(ids), used, block_rows=16)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
def test_one_slot_takes_all_rows_in_order(num_rows):
    plan = one_slot(num_rows, block_rows=16, device=torch.device("cpu"))
    assert plan.order.tolist() == list(range(num_rows))
    assert _rows_by_slot(plan).tolist() == [0] * num_rows
