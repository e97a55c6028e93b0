"""Limits of memory and of reads that the kernel keeps, where this user may make control groups."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.bench import fence as module
from outrider.bench.fence import Fence
from outrider.runtime.errors import UsageError

MIB = 1 << 20
READ = """
import mmap, os, sys
sys.stdin.readline()
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
while os.readv(file, [buffer]): pass
"""
HOLD = "import sys; sys.stdin.readline(); held = b'x' * int(sys.argv[1]); print(len(held))"


@pytest.fixture
def fence(request: pytest.FixtureRequest) -> Iterator[Fence]:
    try:
        made = Fence(f"outrider-test-{request.node.name.partition('[')[0]}-{time.time_ns()}")
    except UsageError as error:
        pytest.skip(str(error))
    with made:
        yield made
    assert not any(group.exists() for group in made._groups)


def inside(fence: Fence, script: str, argument: str) -> subprocess.CompletedProcess[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    fence.admit(child.pid)
    output, _ = child.communicate("go\n")
    return subprocess.CompletedProcess(child.args, child.returncode, output)


def test_memory_beyond_the_limit_is_not_to_be_had(fence: Fence) -> None:
    fence.limit_memory(64 * MIB)
    assert inside(fence, HOLD, str(16 * MIB)).stdout == f"{16 * MIB}\n"
    assert inside(fence, HOLD, str(128 * MIB)).returncode == -9
    fence.limit_memory(None)
    assert inside(fence, HOLD, str(128 * MIB)).returncode == 0


def test_reads_are_no_faster_than_allowed(fence: Fence, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"x" * (8 * MIB))
    try:
        fence.limit_reads(8 * MIB, folder=tmp_path)
    except UsageError as error:
        pytest.skip(str(error))  # a file system without a disk of its own
    began = time.perf_counter()
    done = inside(fence, READ, str(file))
    if done.returncode:
        pytest.skip("no direct reads here")
    assert time.perf_counter() - began > 0.8


def test_a_name_may_hold_a_path() -> None:
    try:
        made = Fence(f"outrider-test-{time.time_ns()}-prefetch:/some/folder with/predictor")
    except UsageError as error:
        if "make control groups" not in str(error) or "No such file" in str(error):
            raise
        pytest.skip(str(error))
    with made:
        assert all(group.is_dir() for group in made._groups)
    assert not any(group.exists() for group in made._groups)


def test_a_machine_without_control_groups_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "mounts"
    empty.write_text("/dev/sda / ext4 rw 0 0\n")
    monkeypatch.setattr(module, "_MOUNTS", empty)
    with pytest.raises(UsageError, match="no control group for 'memory'"):
        Fence("any")
