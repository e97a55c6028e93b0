"""`outrider bench hit-rate` on a real Ray cluster: the table of a local run."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

MAIN = "from outrider.runtime.cli import main; main()"


def test_rows_are_those_of_a_local_run(tmp_path):
    """Counted or simulated, no figure of a row depends on where it was made."""
    collected = subprocess.run(
        [
            sys.executable, "-c", MAIN, "collect", "--datasets", "speeches,code", "--traces", "60",
            "--num-threads", "1", "--hidden-states", "none", "--out", str(tmp_path / "T"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stderr
    tables = []
    for extra in ((), ("--engine", "ray")):
        done = subprocess.run(
            [
                sys.executable, "-c", MAIN, "bench", "hit-rate", str(tmp_path / "T"), "--json",
                "--split", "all", "--tokens", "600", "--policies", "lru,belady,forecast",
                "--predictors", "random,oracle", "--budgets", "10%,50%", "--workers", "2", *extra,
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tables.append(json.loads(done.stdout)["rows"])
    assert len(tables[0]) >= 8
    stamped = {"date"}
    for mine, theirs in zip(*tables, strict=True):
        for name in set(mine) - stamped:
            assert mine[name] == theirs[name], name
