import os
from pathlib import Path

import pytest
from toy_workers import load_toy

SUPPORT = Path(__file__).parents[1] / "support"


def pytest_collection_modifyitems(config, items):
    """Tests marked `ray` take minutes and need the extra: only `-m ray` runs them."""
    if "ray" not in config.option.markexpr:
        asked_for = [item for item in items if item.get_closest_marker("ray") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked_for])
        items[:] = asked_for


@pytest.fixture(scope="session")
def toy():
    """The module tests/collect/toy.py."""
    return load_toy()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine with room for three workers."""
    from outrider.runtime.scaleout.cluster import connected

    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_AUTH_TOKEN"] = "0f" * 32
    try:
        with connected(None, num_workers=3) as made:
            yield made
    finally:
        os.environ.clear()
        os.environ.update(before)
