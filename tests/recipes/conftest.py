"""Makes `recipes`, which is not installed, importable without the root on the path."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

if "recipes" not in sys.modules:
    # The root itself must stay off the path: a bare `kernels` there hides a package transformers
    # looks for.
    folder = Path(__file__).parents[2] / "recipes"
    spec = importlib.util.spec_from_file_location(
        "recipes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["recipes"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `tokenizer.prepare` leaves it: a vocabulary of 300 entries, random streams of six
    domains.
    """
    from recipes.nano import corpus, tokenizer

    folder = tmp_path_factory.mktemp("tokens")
    tokenizer.save(tokenizer.learn(["one two three, one two four"] * 20, vocab_size=300), folder)
    random = np.random.default_rng(0)
    for domain in corpus.DOMAINS:
        for split in ("train", "validation", "test"):
            np.save(folder / f"{domain}.{split}.npy", random.integers(0, 270, 700, dtype=np.uint16))
    return folder
