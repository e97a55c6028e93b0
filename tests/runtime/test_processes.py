"""Pools of processes: none is left behind, however the process that began them ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from outrider.runtime.processes import process_pool

# One process works for long, another has no work.
POOL = """
import time
if __name__ == "__main__":
    from outrider.bench.hit_rate import workspace
    with workspace(2) as (folder, pool):
        working = pool.submit(time.sleep, 600)
        pool.submit(time.sleep, 0).result()
        print(folder, flush=True)
        working.result()
"""


@pytest.fixture
def pool(tmp_path):
    """A process with a pool: (it, its processes, its temporary folder)."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    running = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        folder = Path(running.stdout.readline().strip())
        family = psutil.Process(running.pid).children(recursive=True)
        yield running, family, folder
    finally:
        running.kill()
        running.communicate()
        for process in family:
            if process.is_running():
                process.kill()


def _gone(family):
    _, alive = psutil.wait_procs(family, timeout=30)
    return not alive


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_began_them(pool, ending):
    running, family, folder = pool
    assert len(family) >= 2 + 1 and folder.is_dir()  # Python's own tracker of semaphores
    running.send_signal(ending)
    assert running.wait(timeout=30) == (143 if ending == signal.SIGTERM else -signal.SIGKILL)
    assert _gone(family)
    if ending == signal.SIGTERM:
        assert not folder.exists()


def test_an_error_in_the_block_ends_the_processes_at_once():
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), process_pool(1) as pool:
        pool.submit(time.sleep, 0).result()
        pool.submit(time.sleep, 600)
        raise ZeroDivisionError
    assert time.monotonic() - began < 300
    # Python's own tracker of semaphores stays, one for all pools.
    left = [one for one in psutil.Process().children(recursive=True) if one not in before]
    assert not [one for one in left if "resource_tracker" not in " ".join(one.cmdline())]


def test_sigterm_is_handled_in_the_block_only():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with process_pool(1):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_somebody_elses_handler_stays():
    def handler(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with process_pool(1):
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_work_is_done_in_other_processes():
    with process_pool(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
