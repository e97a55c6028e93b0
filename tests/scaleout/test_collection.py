"""Collection on a real Ray cluster: the rows of a local run, whatever happens to the workers."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import toy_workers
from safetensors.torch import load_file

from outrider.collect import CollectSettings, TraceReader, collect
from outrider.collect.errors import OutOfMemoryError
from outrider.collect.trace import read_manifest
from outrider.runtime.scaleout.collection import collect_with
from outrider.runtime.scaleout.pool import WorkerError, WorkerPool

pytestmark = [
    pytest.mark.ray,
    # Ray's own start-up and shutdown leave sockets and subprocesses to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SETTINGS = {"context_tokens": 24, "batch_size": 4, "seed": 5, "samples_per_shard": 8}


def _corpora(toy):
    return [
        toy.corpus("alpha", documents=60, words=70),
        toy.corpus("beta", documents=40, words=18),
    ]


@pytest.fixture(scope="module")
def local(toy, tmp_path_factory):
    """The folder of a local run of 100 traces."""
    out = tmp_path_factory.mktemp("local") / "T"
    collect(
        toy.ToyMoe(), toy.WordTokenizer(), _corpora(toy), shape=toy.SHAPE, out=out,
        settings=CollectSettings(100, **SETTINGS), model_name="toy", model_format="fp32",
    )  # fmt: skip
    return out


@pytest.fixture
def run(toy, cluster, tmp_path):
    """Collect on the cluster into `tmp_path / "T"`; `tmp_path / "pids"` names the workers."""
    pids = tmp_path / "pids"
    pids.mkdir()

    def runner(
        *, pause_s=0.0, together=1, limits=(), workers=2, resume=False, progress=None, **changes
    ):
        pool = WorkerPool(
            cluster,
            "toy_workers:ToyShardWorker",
            (pids, pause_s, together, *limits),
            num_workers=workers,
        )
        with pool:
            return collect_with(
                pool, toy.WordTokenizer(), _corpora(toy), out=tmp_path / "T", resume=resume,
                settings=CollectSettings(100, num_workers=workers, **(SETTINGS | changes)),
                progress=progress,
            )  # fmt: skip

    return runner


def _rows(folder: Path) -> list[dict[str, object]]:
    """Every column and hidden state of every row, in the order of samples."""
    rows = []
    for shard in read_manifest(folder).shards:
        table = pq.read_table(folder / shard.file).to_pylist()
        if shard.hidden is not None:
            for name, states in sorted(load_file(folder / shard.hidden).items()):
                for row, state in zip(table, states.double().tolist(), strict=True):
                    row[name] = state
        rows += table
    return rows


def _equal(folder: Path, local: Path) -> bool:
    """The same rows, each sample once, all files whole; and nothing left beside them."""
    reader = TraceReader(folder)
    reader.verify()
    listed = {shard.file for shard in reader.manifest.shards}
    found = {path.relative_to(folder).as_posix() for path in (folder / "shards").iterdir()}
    assert listed == found and reader.manifest.complete and not list(folder.rglob("*.tmp"))
    return _rows(folder) == _rows(local)


def test_two_workers_give_the_rows_of_a_local_run(run, local, tmp_path):
    told = []
    report = run(together=2, progress=told.append)
    assert _equal(tmp_path / "T", local)
    assert report.new_traces == 100
    alone = read_manifest(local)
    assert [s.first_sample for s in report.manifest.shards] == [
        s.first_sample for s in alone.shards
    ]
    assert {s.checksum for s in report.manifest.shards} == {s.checksum for s in alone.shards}
    assert len(list((tmp_path / "pids").iterdir())) == 2
    for name, total in (("alpha", 60), ("beta", 40)):
        mine = [progress for progress in told if progress.dataset == name]
        assert mine[-1].done == mine[-1].total == total


def test_shards_cut_for_many_workers_hold_the_same_rows(run, local, tmp_path):
    report = run(workers=3, samples_per_shard=None)
    assert _equal(tmp_path / "T", local)
    assert len(report.manifest.shards) >= 18


def _kill_workers(pids: Path, *, times: int, chance: random.Random) -> None:
    """kill -9 one worker after the other, each some time after it has started."""
    killed: set[str] = set()
    while len(killed) < times:
        alive = [path.name for path in pids.iterdir() if path.name not in killed]
        if alive:
            time.sleep(chance.uniform(0.0, 0.6))
            victim = chance.choice(alive)
            killed.add(victim)
            if psutil.pid_exists(int(victim)):
                os.kill(int(victim), signal.SIGKILL)
        time.sleep(0.02)


def test_killed_workers_are_replaced_and_no_shard_counts_twice(run, local, tmp_path):
    killer = threading.Thread(
        target=_kill_workers,
        args=(tmp_path / "pids",),
        kwargs={"times": 2, "chance": random.Random()},
        daemon=True,
    )
    killer.start()
    report = run(pause_s=0.3)
    assert {shard.batch_size for shard in report.manifest.shards} == {4}
    assert len(list((tmp_path / "pids").iterdir())) >= 3
    assert _equal(tmp_path / "T", local)
    assert "is replaced" in (tmp_path / "T" / "collection.log").read_text()


def test_a_worker_that_hangs_holds_up_nobody(run, local, tmp_path):
    """Stopped in the middle of a shard: it neither dies nor answers."""
    pids = tmp_path / "pids"

    def stop(progress):
        if progress.done and not stopped:
            stopped.append(int(next(pids.iterdir()).name))
            os.kill(stopped[0], signal.SIGSTOP)

    stopped: list[int] = []
    began = time.monotonic()
    run(pause_s=0.1, progress=stop)
    assert _equal(tmp_path / "T", local)
    assert stopped and time.monotonic() - began < 90
    gone = time.monotonic() + 20
    while psutil.pid_exists(stopped[0]) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not psutil.pid_exists(stopped[0])


def test_a_worker_short_of_memory_takes_smaller_batches(run, local, tmp_path):
    report = run(limits=(2,))
    assert {shard.batch_size for shard in report.manifest.shards} == {2}
    assert _equal(tmp_path / "T", local)


def test_what_fits_in_no_batch_is_told_as_a_local_run_tells_it(run):
    with pytest.raises(OutOfMemoryError, match="not even one sample of 24 tokens"):
        run(limits=(10**9, 8))


def test_a_shard_that_ends_every_worker_is_given_up(run, tmp_path):
    stop = threading.Event()

    def kill_all():
        while not stop.wait(0.02):
            for path in (tmp_path / "pids").iterdir():
                if psutil.pid_exists(int(path.name)):
                    time.sleep(0.3)
                    os.kill(int(path.name), signal.SIGKILL)
                path.unlink()

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(WorkerError, match=r"ended 3 workers|cannot start"):
            run(pause_s=2.0, workers=1)
    finally:
        stop.set()
        killer.join()


DRIVER = """
import sys
from pathlib import Path
import toy_workers
from outrider.collect import CollectSettings
from outrider.runtime.scaleout.cluster import connected
from outrider.runtime.scaleout.collection import collect_with
from outrider.runtime.scaleout.pool import WorkerPool
toy, out, pause_s = toy_workers.load_toy(), Path(sys.argv[1]), float(sys.argv[2])
corpora = [toy.corpus("alpha", documents=60, words=70), toy.corpus("beta", documents=40, words=18)]
with connected(None, num_workers=2) as cluster:
    arguments = (out.parent / "pids", pause_s)
    with WorkerPool(cluster, "toy_workers:ToyShardWorker", arguments, num_workers=2) as pool:
        collect_with(
            pool, toy.WordTokenizer(), corpora, out=out, resume=out.exists(),
            settings=CollectSettings(100, 24, 4, seed=5, samples_per_shard=8, num_workers=2),
        )
"""


def _drive(out: Path, pause_s: float, **variables: str) -> subprocess.Popen[str]:
    environment = (
        os.environ
        | variables
        | {"PYTHONPATH": f"{Path(toy_workers.__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    )
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(pause_s)],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_worker_that_ray_ends_for_memory_is_told_so_and_batches_get_smaller(tmp_path):
    """The limit of the node's memory is set below what this machine uses already."""
    out = tmp_path / "T"
    (tmp_path / "pids").mkdir()
    driver = _drive(out, 1.0, RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="50")
    said = driver.communicate()[1]
    assert driver.returncode == 1
    assert "WorkerError" in said and "Memory on the node" in said
    log = out / "collection.log"
    if log.exists():  # a worker got as far as a shard
        assert "batch size 2 from now on" in log.read_text()


def test_a_killed_driver_leaves_whole_shards_and_no_processes_and_is_resumed(toy, local, tmp_path):
    """Its own cluster dies with it; what it began goes on without any."""
    out, pids = tmp_path / "T", tmp_path / "pids"
    pids.mkdir()
    driver = _drive(out, 0.3)
    try:
        deadline = time.monotonic() + 240
        while not (out / "manifest.json").exists() or len(read_manifest(out).shards) < 2:
            assert driver.poll() is None and time.monotonic() < deadline, driver.stderr.read()
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
        time.sleep(random.uniform(0.0, 0.5))
    finally:
        driver.kill()
        driver.communicate()
    TraceReader(out).verify()
    assert 2 <= len(read_manifest(out).shards) < 14
    assert family
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    collect(
        toy.ToyMoe(), toy.WordTokenizer(), _corpora(toy), shape=toy.SHAPE, out=out,
        settings=CollectSettings(100, **SETTINGS), model_name="toy", model_format="fp32",
        resume=True,
    )  # fmt: skip
    assert _equal(out, local)


def test_the_command_gives_the_rows_of_the_local_command(tmp_path):
    """`outrider collect nano --engine ray --workers 2` against the same without."""
    words = [
        sys.executable, "-c", "from outrider.runtime.cli import main; main()",
        "collect", "nano", "--datasets", "speeches,code", "--traces", "48", "--seed", "3", "--json",
        "--num-threads", "1",
    ]  # fmt: skip
    documents = []
    for name, extra in (("local", []), ("ray", ["--engine", "ray", "--workers", "2"])):
        done = subprocess.run(
            [*words, "--out", str(tmp_path / name), *extra], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        documents.append(json.loads(done.stdout))
    assert _equal(tmp_path / "ray", tmp_path / "local")
    assert documents[0]["datasets"] == documents[1]["datasets"]
    assert documents[1]["threads"] == 1
