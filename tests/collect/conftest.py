import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"collect_test_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module `toy.py`: a tiny model, a word tokenizer, corpora."""
    torch.set_num_threads(1)
    return _load("toy")


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The module `planted.py`: traces whose true figures are known."""
    return _load("planted")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
