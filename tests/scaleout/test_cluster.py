"""Who is let into a cluster, and which workers may work together: a real one of two nodes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_workers

pytestmark = pytest.mark.ray

SUPPORT = Path(toy_workers.__file__).parent

# A node of one CPU that waits to be told, or two: the second one's Python finds another version of
# pyarrow where asked to. Then this process joins by address and collects.
TWO_NODES = """
import os, sys
from pathlib import Path
from outrider.runtime.scaleout import cluster as door
door._use_tokens(None)
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
nodes = Cluster(initialize_head=True, head_node_args=head)
print(nodes.address, os.environ["RAY_AUTH_TOKEN"], flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
    nodes.shutdown()
    sys.exit()
other = {"env_vars": {"PYTHONPATH": sys.argv[2]}} if sys.argv[2] else {}
nodes.add_node(num_cpus=1, object_store_memory=100 << 20, **other)
import toy_workers
from outrider.collect import CollectSettings
from outrider.runtime.scaleout.collection import collect_with
from outrider.runtime.scaleout.pool import WorkerPool
toy, out = toy_workers.load_toy(), Path(sys.argv[1])
(out.parent / "pids").mkdir()
try:
    with door.connected(nodes.address, num_workers=2) as cluster:
        assert cluster.nodes == 2 and cluster.cpus == 2
        arguments = (out.parent / "pids", 0.05, 2)
        with WorkerPool(cluster, "toy_workers:ToyShardWorker", arguments, num_workers=2) as pool:
            collect_with(
                pool, toy.WordTokenizer(), [toy.corpus("alpha", documents=60, words=70)], out=out,
                settings=CollectSettings(60, 24, 4, seed=5, samples_per_shard=8, num_workers=2),
            )
finally:
    nodes.shutdown()
"""


def _environment(**changes):
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PYTHONPATH": path} | changes


def _two_nodes(*words):
    return subprocess.Popen(
        [sys.executable, "-c", TWO_NODES, *words], env=_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_nodes_share_one_collection(tmp_path):
    from outrider.collect import TraceReader

    running = _two_nodes(str(tmp_path / "T"), "")
    _, errors = running.communicate()
    assert running.returncode == 0, errors[-3000:]
    reader = TraceReader(tmp_path / "T")
    reader.verify()
    assert reader.manifest.complete and reader.num_samples == 60
    # As one CPU is all that a node has, there was a worker on each.
    assert len(list((tmp_path / "pids").iterdir())) == 2


def test_workers_of_another_version_are_refused_by_name(tmp_path):
    other = tmp_path / "other"
    (other / "pyarrow-1.2.3.dist-info").mkdir(parents=True)
    (other / "pyarrow-1.2.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pyarrow\nVersion: 1.2.3\n"
    )
    path = os.pathsep.join([str(other), _environment()["PYTHONPATH"]])
    running = _two_nodes(str(tmp_path / "T"), path)
    _, errors = running.communicate()
    assert running.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert "WorkerError: workers differ (pyarrow: " in last and "1.2.3" in last
    assert "install the same versions" in last


def test_a_wrong_token_is_refused_with_what_to_check_and_nothing_is_written(tmp_path):
    running = _two_nodes("wait", "")
    try:
        line = running.stdout.readline()
        assert line, running.stderr.read()
        address, token = line.split()
        command = [
            sys.executable, "-c", "from outrider.runtime.cli import main; main()", "collect",
            "--engine", "ray", "--address", address, "--workers", "1", "--traces", "4",
            "--out", str(tmp_path / "T"),
        ]  # fmt: skip
        wrong = "1" + token[1:] if token[0] != "1" else "2" + token[1:]
        done = subprocess.run(
            command,
            env=_environment(RAY_AUTH_TOKEN=wrong, RAY_py_gcs_connect_timeout_s="5"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"outrider: no Ray cluster at {address}")
        assert "that the token is the cluster's own" in last
        assert "InvalidAuthToken" in done.stderr  # it was the token, in Ray's own words
        assert "Traceback" not in done.stderr and not (tmp_path / "T").exists()
    finally:
        running.communicate("")
