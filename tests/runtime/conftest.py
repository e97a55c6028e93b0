"""What the runtime's tests share: tiny models of a session, and a cache folder of their own."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def store_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed stores of a test run go nowhere near the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTRIDER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny checkpoints, loaded models and references, made once: see `engines.Models`."""
    import engines
    import torch

    torch.set_num_threads(1)
    return engines.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are read one by one through os.preadv, as where the native call was not built."""
    from outrider.runtime.experts import reader

    monkeypatch.setattr(reader, "native_call", lambda: None)
