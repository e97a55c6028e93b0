"""The gateway that a module's tests share."""

import threading
from collections.abc import Iterator

import pytest
from scripted_client import ScriptedClient
from served_gateway import Gateway, run_gateway


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    """One gateway a module, whose script each test sets."""
    with run_gateway() as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    """The module's gateway, as it was at first."""
    upstream, fresh = shared.upstream, ScriptedClient()
    upstream.script, upstream.failure = fresh.script, None
    upstream.stats_answers = fresh.stats_answers
    upstream.requests.clear()
    upstream.was_cancelled = threading.Event()
    return shared
