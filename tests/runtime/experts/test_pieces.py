"""The native call that reads runs of pieces: a plain read's bytes, whatever goes wrong."""

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.collect.schema import ExpertKey
from outrider.runtime.errors import TransferError
from outrider.runtime.experts.cache import Kind
from outrider.runtime.experts.layout import Extent
from outrider.runtime.experts.memory import map_memory
from outrider.runtime.experts.pieces import Halt, native_call, split_extents
from outrider.runtime.experts.reader import FileReader, ReadPlan, bounce_buffer
from outrider.runtime.experts.slots import SlotArena
from outrider.runtime.experts.thread_transfer import ThreadTransfer
from outrider.runtime.testing import SyntheticExperts

KEYS = [ExpertKey(0, expert_idx) for expert_idx in range(6)]
PIECE = 8192
FILE_BYTES = 100_000

needs_native = pytest.mark.skipif(native_call() is None, reason="the native call is not built")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_compiler_makes_the_native_call() -> None:
    assert native_call() is not None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(FILE_BYTES))
    return path


@pytest.fixture(scope="module", params=[None, False], ids=["direct", "buffered"])
def reader(request: pytest.FixtureRequest) -> Iterator[FileReader]:
    reader = FileReader(direct=request.param, stopping=threading.Event())
    yield reader
    reader.close()


@st.composite
def extents(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(offset, length) in file order, some side by side, some on blocks, the last up to the end."""
    cuts = st.one_of(st.integers(1, FILE_BYTES - 1), st.sampled_from(range(4096, FILE_BYTES, 4096)))
    bounds = sorted(draw(st.sets(cuts, min_size=1, max_size=5)) | {FILE_BYTES})
    spans = [(start, end - start) for start, end in itertools.pairwise(bounds)]
    kept = draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    return [span for span, is_kept in zip(spans, kept, strict=True) if is_kept] or spans[-1:]


@needs_native
@given(extents(), st.randoms(use_true_random=False), st.booleans())
def test_a_run_reads_what_a_plain_read_does(
    file: Path, reader: FileReader, spans: list[tuple[int, int]], random: object, on_blocks: bool
) -> None:
    random.shuffle(spans)  # type: ignore[attr-defined]
    slot, found, end = memoryview(map_memory(2 * FILE_BYTES)), [], 0
    for offset, length in spans:
        end = -(-end // 4096) * 4096 if on_blocks else end
        found.append(Extent(file, offset, length, end))
        end += length
    pieces = split_extents(found, PIECE)
    plan = ReadPlan(pieces)
    count = reader.read_run(
        plan, range(len(pieces)), slot=slot, bounce=bounce_buffer(PIECE), halt=Halt(0)
    )
    assert count == len(pieces) and plan.native is not None
    content = file.read_bytes()
    expected = bytearray(2 * FILE_BYTES)
    for one in found:
        chunk = content[one.offset : one.offset + one.length]
        expected[one.slot_offset : one.slot_offset + one.length] = chunk
    assert slot == expected


@needs_native
def test_a_halt_ends_a_run_before_its_next_piece(file: Path, reader: FileReader) -> None:
    plan = ReadPlan(split_extents([Extent(file, 0, FILE_BYTES, 0)], PIECE))
    slot, bounce = memoryview(map_memory(FILE_BYTES)), bounce_buffer(PIECE)
    first, rest = range(1), range(1, len(plan.pieces))
    assert reader.read_run(plan, first, slot=slot, bounce=bounce, halt=Halt(0)) == 1
    assert reader.read_run(plan, rest, slot=slot, bounce=bounce, halt=Halt(1)) == 0
    assert plan.native is not None
    assert plan.native.read(rest, slot=slot, bounce=bounce, halt=Halt(1)) == (0, False)
    assert bytes(slot[:PIECE]) == file.read_bytes()[:PIECE] and not any(slot[PIECE:])


@needs_native
@pytest.mark.parametrize("direct", [None, False])
def test_a_lost_descriptor_costs_only_its_transfers(
    loose: SyntheticExperts, arena: SlotArena, direct: bool | None
) -> None:
    with ThreadTransfer(loose, arena, piece_bytes=PIECE, direct=direct) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        files = engine.reader._files
        path = min(files)
        opened = files[path]
        kept = [os.dup(one) for one in (opened.buffered, opened.direct) if one is not None]
        lost = [one for one in (opened.buffered, opened.direct) if one is not None]
        for descriptor in lost:
            os.close(descriptor)
        try:
            for key, kind in ((KEYS[1], Kind.ON_DEMAND), (KEYS[2], Kind.PREFETCH)):
                with pytest.raises(TransferError, match=f"{path}.*{os.strerror(errno.EBADF)}"):
                    engine.submit(key, key.expert_idx, kind).wait()
        finally:
            for copy, descriptor in zip(kept, lost, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
        engine.submit(KEYS[1], 1, Kind.ON_DEMAND).wait()
        assert not engine.degraded and engine.outstanding_bytes() == 0
    assert loose.is_held(KEYS[1], arena, 1)


@needs_native
def test_a_file_that_ends_early_is_named_and_read_again_once_it_is_whole(
    loose: SyntheticExperts, arena: SlotArena
) -> None:
    extent = loose.layout(KEYS[5]).extents[-1]
    content = extent.file.read_bytes()
    with ThreadTransfer(loose, arena, piece_bytes=PIECE) as engine:
        engine.submit(KEYS[0], 0, Kind.ON_DEMAND).wait()
        os.truncate(extent.file, extent.offset + extent.length - 1)
        with pytest.raises(TransferError, match=f"{extent.file}: .*truncated or replaced"):
            engine.submit(KEYS[5], 5, Kind.ON_DEMAND).wait()
        with extent.file.open("r+b") as handle:
            handle.write(content)
        engine.submit(KEYS[5], 5, Kind.ON_DEMAND).wait()
    assert loose.is_held(KEYS[5], arena, 5)
