"""Block layout and the check that a source's extents fill what will be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey, ModelShape
from outrider.runtime.experts.layout import (
    BLOCK_ALIGN,
    VIEW_ALIGN,
    ExpertLayout,
    Extent,
    TensorView,
    block_views,
)
from outrider.runtime.experts.pieces import split_extents
from outrider.runtime.testing import write_experts

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]
PARTS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=3),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 33), max_size=3).map(tuple)),
    min_size=1,
    max_size=6,
)


@given(PARTS)
def test_views_are_aligned_disjoint_and_in_order(
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    views, nbytes = block_views(parts)
    assert list(views) == list(parts)
    end = 0
    for name, view in views.items():
        assert (view.dtype, view.shape) == parts[name]
        assert view.nbytes == torch.empty(view.shape, dtype=view.dtype).nbytes
        assert view.offset % VIEW_ALIGN == 0
        assert end <= view.offset < end + VIEW_ALIGN
        end = view.offset + view.nbytes
    assert end <= nbytes < end + BLOCK_ALIGN
    assert nbytes % BLOCK_ALIGN == 0


def layout(*extents: tuple[int, int]) -> ExpertLayout:
    """Extents (slot_offset, length) of one file against one view of 100 floats."""
    views = {"weight": TensorView(torch.float32, (100,), 64)}
    return ExpertLayout(
        tuple(Extent(Path("file"), 0, length, offset) for offset, length in extents), views, 4096
    )


@pytest.mark.parametrize(
    "extents",
    [[(0, 4096)], [(64, 400)], [(264, 200), (64, 200)], [(0, 65), (65, 500)]],
    ids=["whole-block", "exactly-the-view", "two-parts-out-of-order", "parts-inside-the-view"],
)
def test_extents_that_fill_the_views_pass(extents: list[tuple[int, int]]) -> None:
    layout(*extents).check()
    assert layout(*extents).bytes_read == sum(length for _, length in extents)


@pytest.mark.parametrize(
    ("extents", "complaint"),
    [
        ([(64, 399)], "weight"),
        ([(65, 400)], "weight"),
        ([(64, 200), (265, 199)], "weight"),
        ([], "weight"),
        ([(64, 201), (264, 200)], "overlaps"),
        ([(64, 400), (64, 400)], "overlaps"),
        ([(0, 4097)], "inside"),
        ([(-64, 4096)], "inside"),
        ([(64, 0)], "inside"),
    ],
    ids=str,
)
def test_extents_with_gaps_or_overlaps_are_refused(
    extents: list[tuple[int, int]], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        layout(*extents).check()


def test_a_view_off_its_alignment_is_refused() -> None:
    views = {"weight": TensorView(torch.float32, (4,), 32)}
    with pytest.raises(ValueError, match="not on 64"):
        ExpertLayout((Extent(Path("file"), 0, 4096, 0),), views, 4096).check()


@given(
    st.lists(st.tuples(st.integers(0, 20000), st.integers(1, 30000)), min_size=1, max_size=4),
    st.sampled_from([4096, 8192, 1 << 20]),
)
def test_pieces_cover_each_byte_once_and_meet_on_blocks(
    spans: list[tuple[int, int]], piece_bytes: int
) -> None:
    extents = []
    slot_offset = 0
    for offset, length in spans:
        extents.append(Extent(Path("file"), offset, length, slot_offset))
        slot_offset += length
    pieces = split_extents(extents, piece_bytes)
    places = np.full(slot_offset, -1)
    for piece in pieces:
        assert piece.length <= piece_bytes
        assert piece.length == sum(length for _, length in piece.parts) > 0
        position = piece.offset
        for start, length in piece.parts:
            assert (places[start : start + length] == -1).all(), "a byte is read twice"
            places[start : start + length] = np.arange(position, position + length)
            position += length
    expected = [np.arange(one.offset, one.offset + one.length) for one in extents]
    assert np.array_equal(places, np.concatenate(expected))
    begins = {extent.offset for extent in extents}
    assert all(piece.offset % BLOCK_ALIGN == 0 or piece.offset in begins for piece in pieces)


def test_extents_that_lie_side_by_side_are_read_as_one() -> None:
    # Down, gate and up in the file, as names are sorted; gate, up and down in the slot.
    gate, up = Extent(Path("a"), 2600, 100, 0), Extent(Path("a"), 2700, 100, 100)
    down, other = Extent(Path("a"), 2500, 100, 200), Extent(Path("b"), 2800, 100, 300)
    first, last = split_extents([gate, up, down, other], 1 << 20)
    assert (first.file, first.offset, first.length) == (Path("a"), 2500, 300)
    assert first.parts == ((200, 100), (0, 100), (100, 100))
    assert (last.file, last.offset, last.parts) == (Path("b"), 2800, ((300, 100),))


@pytest.mark.parametrize("is_packed", [True, False])
def test_synthetic_layouts_are_sound(tmp_path: Path, is_packed: bool) -> None:
    shape = ModelShape(2, 3, 1, 20, 12, "")
    source = write_experts(tmp_path, shape, dtype=torch.bfloat16, is_packed=is_packed)
    seen: set[tuple[Path, int]] = set()
    for layer_idx in range(2):
        for expert_idx in range(3):
            expert = source.layout(ExpertKey(layer_idx, expert_idx))
            expert.check()
            assert (expert.views, expert.nbytes) == (source.views, source.nbytes)
            seen.update((extent.file, extent.offset) for extent in expert.extents)
    assert len(seen) == (6 if is_packed else 18), "no two experts share bytes"
