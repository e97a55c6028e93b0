"""The slot arena: what a block holds is what the views show, over all slots and dtypes."""

import gc
import weakref

import pytest
import torch

from outrider.runtime.errors import InsufficientMemoryError
from outrider.runtime.experts.layout import TensorView, block_views
from outrider.runtime.experts.slots import SlotArena

VIEWS, NBYTES = block_views(
    {
        "gate_up_proj": (torch.bfloat16, (6, 5)),
        "down_proj": (torch.uint8, (5, 3)),
        "down_proj.scale": (torch.float32, (7,)),
        "scalar": (torch.int8, ()),
    }
)


def test_bytes_written_to_a_block_are_seen_in_its_views() -> None:
    with SlotArena(4, VIEWS, NBYTES) as arena:
        generator = torch.Generator().manual_seed(0)
        expected: dict[tuple[int, str], torch.Tensor] = {}
        for slot in range(4):
            block = arena.block(slot)
            assert len(block) == NBYTES and not block.readonly
            for name, view in VIEWS.items():
                data = torch.randint(0, 120, (view.nbytes,), generator=generator, dtype=torch.uint8)
                block[view.offset : view.offset + view.nbytes] = data.numpy().tobytes()
                expected[slot, name] = data.view(view.dtype).reshape(view.shape)
        for (slot, name), value in expected.items():
            assert torch.equal(arena.view(slot, name), value)
            assert torch.equal(arena.stacked(name)[slot], value)


def test_stacked_views_gather_by_slot_without_copying() -> None:
    with SlotArena(3, VIEWS, NBYTES) as arena:
        for name, view in VIEWS.items():
            stacked = arena.stacked(name)
            assert stacked.shape == (3, *view.shape)
            assert stacked.stride(0) * view.dtype.itemsize == NBYTES
            for slot in range(3):
                assert stacked[slot].data_ptr() == arena.view(slot, name).data_ptr()
                assert stacked[slot].data_ptr() % 64 == 0
                assert stacked[slot].is_contiguous()


def test_blocks_start_on_pages() -> None:
    views = {"weight": TensorView(torch.float32, (4,), 0)}
    with SlotArena(3, views, 8192) as arena:
        assert [arena.view(slot, "weight").data_ptr() % 4096 for slot in range(3)] == [0, 0, 0]


def test_poison_turns_one_slot_into_nan_and_no_other() -> None:
    with SlotArena(3, VIEWS, NBYTES) as arena:
        arena.poison(1)
        for name in ("gate_up_proj", "down_proj.scale"):
            assert arena.view(1, name).isnan().all()
            assert not arena.view(0, name).isnan().any()
            assert not arena.view(2, name).isnan().any()
        assert bytes(arena.block(1)) == b"\xff" * NBYTES


def test_an_arena_beyond_two_gibibytes_of_elements_is_addressed_right() -> None:
    views = {"weight": TensorView(torch.uint8, (16,), 0)}
    # Pages that are never touched cost nothing: 3 GiB of address space, two pages of memory.
    with SlotArena(3, views, 1 << 30) as arena:
        arena.block(2)[:16] = bytes(range(16))
        assert arena.stacked("weight")[2].tolist() == list(range(16))
        assert arena.stacked("weight")[1].tolist() == [0] * 16


def test_other_devices_have_views_but_no_host_block() -> None:
    # The meta device stands in for a GPU: same geometry, no memory.
    with SlotArena(3, VIEWS, NBYTES, device="meta") as arena:
        for name, view in VIEWS.items():
            stacked = arena.stacked(name)
            assert (stacked.shape, stacked.dtype) == ((3, *view.shape), view.dtype)
            assert stacked.stride(0) * view.dtype.itemsize == NBYTES
            assert stacked.storage_offset() * view.dtype.itemsize == view.offset
        with pytest.raises(TypeError, match="no host memory"):
            arena.block(0)


@pytest.mark.parametrize("slot", [-1, 3])
def test_slots_outside_of_the_arena_are_refused(slot: int) -> None:
    with SlotArena(3, VIEWS, NBYTES) as arena:
        with pytest.raises(IndexError):
            arena.block(slot)
        with pytest.raises(IndexError):
            arena.view(slot, "down_proj")


@pytest.mark.parametrize(
    ("num_slots", "views", "nbytes"),
    [
        (0, VIEWS, NBYTES),
        (1, VIEWS, NBYTES + 64),
        (1, VIEWS, 0),
        (1, {"weight": TensorView(torch.float32, (4,), 32)}, 4096),
        (1, {"weight": TensorView(torch.float32, (1025,), 0)}, 4096),
    ],
    ids=["no-slot", "unaligned-block", "no-bytes", "unaligned-view", "view-outside"],
)
def test_senseless_arenas_are_refused(
    num_slots: int, views: dict[str, TensorView], nbytes: int
) -> None:
    with pytest.raises(ValueError, match="block"):
        SlotArena(num_slots, views, nbytes)


def test_an_arena_larger_than_the_address_space_names_its_size() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"GiB.*--expert-memory"):
        SlotArena(1 << 30, VIEWS, 1 << 22)


def test_closing_frees_the_memory_once_the_last_view_is_gone() -> None:
    arena = SlotArena(2, VIEWS, NBYTES)
    memory = weakref.ref(arena._memory) if arena._memory is not None else None
    assert memory is not None
    view = arena.view(1, "down_proj.scale")
    view.fill_(3.0)
    arena.close()
    arena.close()
    assert view.tolist() == [3.0] * 7, "a view outlives the arena"
    del view
    gc.collect()
    assert memory() is None
    with pytest.raises(TypeError):
        arena.block(0)
