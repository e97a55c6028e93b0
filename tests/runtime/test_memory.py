"""Memory as the kernel grants it: the machine's, or what the control groups above us leave."""

from types import SimpleNamespace

import psutil
import pytest

from outrider.runtime import memory

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 64 GiB, 40 of them free, and control groups that a test writes."""

    class Groups:
        root = tmp_path / "cgroup"

        def put(self, folder, **files):
            path = self.root / folder
            path.mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (path / f"memory.{name}").write_text(f"{value}\n")

        def belong(self, lines):
            (tmp_path / "self").write_text(lines)

    virtual = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: virtual)
    monkeypatch.setattr(memory, "_CGROUP", Groups.root)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "self")
    Groups.root.mkdir()
    return Groups()


def test_without_groups_it_is_the_machines(groups):
    assert memory.total_bytes() == 64 * GIB
    assert memory.available_bytes() == 40 * GIB


def test_a_container_sees_its_own_group_at_the_root(groups):
    groups.belong("0::/\n")
    groups.put("", max=8 * GIB, current=5 * GIB, stat=f"anon 1\ninactive_file {2 * GIB}\nfile 3")
    assert memory.total_bytes() == 8 * GIB
    assert memory.available_bytes() == 5 * GIB  # what the page cache gives back counts as free


def test_the_narrowest_of_the_groups_above_us_counts(groups):
    # As with systemd-run --scope -p MemoryMax=...: the limit is not at the root.
    groups.belong("0::/user.slice/run.scope\n")
    groups.put("", max="max", current=20 * GIB, stat="inactive_file 0")
    groups.put("user.slice", max=16 * GIB, current=15 * GIB, stat="inactive_file 0")
    groups.put("user.slice/run.scope", max=4 * GIB, current=1 * GIB, stat="inactive_file 0")
    assert memory.total_bytes() == 4 * GIB
    assert memory.available_bytes() == 1 * GIB


def test_groups_of_the_first_version_count_too(groups):
    groups.belong("11:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    groups.put(
        "memory/docker/abc",
        limit_in_bytes=6 * GIB,
        usage_in_bytes=4 * GIB,
        stat=f"cache 1\ntotal_inactive_file {1 * GIB}",
    )
    assert memory.total_bytes() == 6 * GIB
    assert memory.available_bytes() == 3 * GIB


def test_a_container_of_the_first_version_sees_its_group_at_the_root(groups):
    # Membership names the host's path, which is not there inside.
    groups.belong("11:memory:/docker/abc\n")
    groups.put("memory", limit_in_bytes=6 * GIB, usage_in_bytes=4 * GIB, stat="")
    assert memory.total_bytes() == 6 * GIB
    assert memory.available_bytes() == 2 * GIB


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"max": "max", "current": 3 * GIB}, id="unlimited"),
        pytest.param({"max": 2**63 - 4096, "current": 3 * GIB, "stat": ""}, id="huge"),
        pytest.param({"max": "nonsense", "current": "?"}, id="nonsense"),
        pytest.param({}, id="no-files"),
    ],
)
def test_a_group_without_a_limit_limits_nothing(groups, files):
    groups.belong("0::/\n")
    groups.put("", **files)
    assert memory.total_bytes() == 64 * GIB
    assert memory.available_bytes() == 40 * GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(groups):
    groups.belong("0::/\n")
    groups.put("", max=4 * GIB, current=5 * GIB, stat="inactive_file 0")
    assert memory.available_bytes() == 0


def test_a_group_is_not_more_than_the_machine(groups):
    groups.belong("0::/\n")
    groups.put("", max=100 * GIB, current=0, stat="inactive_file 0")
    assert memory.total_bytes() == 64 * GIB
    assert memory.available_bytes() == 40 * GIB


def test_this_machine_has_memory_and_some_of_it_is_free():
    free, total = memory.device_bytes("cpu", None)
    assert 0 < free <= total <= psutil.virtual_memory().total
    block = bytearray(64 << 20)
    assert len(block) <= total
