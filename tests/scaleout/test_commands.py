"""What the commands say where there is no cluster to talk to; no Ray is needed or started."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from outrider.runtime.cli import app
from outrider.runtime.scaleout import cluster


def _run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "words", [("collect", "nano", "--engine", "ray", "--out", "T")], ids=["collect"]
)
def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    # What the environment is told before Ray is imported goes with the test.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "token" if name == "RAY_AUTH_MODE" else "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    result = _run(*words)
    assert result.exit_code == 1
    assert result.output.strip().endswith("this needs ray: pip install 'outrider[ray]'")
    assert not list(tmp_path.iterdir())


def test_nothing_imports_ray_but_the_flag():
    """Every command's module, the collector and the engine, in a process of their own."""
    program = (
        "import importlib, sys\n"
        "from outrider.runtime.cli import COMMANDS\n"
        "for module, _ in COMMANDS.values():\n"
        "    importlib.import_module(f'outrider.runtime.{module}')\n"
        "import outrider.collect.collector, outrider.runtime.scaleout.pool\n"
        "import outrider.runtime.scaleout.cluster, outrider.runtime.scaleout.queue\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", "2"), "--workers is for workers of a cluster; add --engine ray"),
        (("--address", "auto"), "--address is for workers of a cluster; add --engine ray"),
        (("--engine", "ray", "--workers", "0"), "workers"),
        (("--engine", "spark"), "engine"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, words, said):
    result = _run("collect", "nano", "--out", tmp_path / "T", *words)
    assert result.exit_code == 2 and said in result.output
    assert not (tmp_path / "T").exists()


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No token anywhere."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # Set first, so that the test's own setting is taken back as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_a_cluster_that_runs_is_not_joined_without_its_token(bare, tmp_path):
    result = _run("collect", "--out", tmp_path / "T", "--engine", "ray", "--address", "auto")
    assert result.exit_code == 2
    assert "no token for the cluster at auto" in result.output
    assert "RAY_AUTH_TOKEN" in result.output and "~/.ray/auth_token" in result.output


def test_tokens_cannot_be_turned_off(bare, tmp_path):
    bare.setenv("RAY_AUTH_MODE", "disabled")
    result = _run("collect", "--out", tmp_path / "T", "--engine", "ray")
    assert result.exit_code == 2 and "RAY_AUTH_MODE=disabled" in result.output


def test_an_own_cluster_gets_a_new_token_each_time(bare):
    import os

    tokens = set()
    for _ in range(2):
        bare.delenv("RAY_AUTH_TOKEN", raising=False)
        cluster._use_tokens(None)
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)
