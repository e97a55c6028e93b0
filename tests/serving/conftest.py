"""One server process a module, over the double; every test of it leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served_double
import wire as by_hand
from served_double import PATIENT, ServerProcess
from wire import Wire, reconcile

from outrider.runtime.serving.client import Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[ServerProcess]:
    """A module may set SERVER to a dict of settings."""
    settings = getattr(request.module, "SERVER", {})
    started = served_double.start(folder_of(tmp_path_factory), **settings)
    yield started
    is_alive = started.process.poll() is None
    started.kill()
    assert is_alive, started.log_file.read_text()


def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short, since a socket's path may have 107 bytes only.
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Wire]:
    """A connection; afterwards nothing is open and the server's counters add up."""
    with by_hand.wire(server.address) as one:
        yield one
    with by_hand.wire(server.address) as after:
        reconcile(after.settle())


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address, timeout_s=120, options=PATIENT) as one:
        yield one
    with by_hand.wire(server.address) as after:
        reconcile(after.settle())
