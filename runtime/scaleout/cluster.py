"""A Ray cluster to work on: one of this machine's own, or one that is running, always with a token.

The only module that imports Ray. Knows no work.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutriderError, UsageError

OLDEST_RAY = (2, 52)
# An own cluster's object store holds shards on their way to the disk, never many at a time.
_OBJECT_STORE_BYTES = 256 << 20
_TOKEN_FILE = Path(".ray") / "auth_token"


class ClusterError(OutriderError):
    """The cluster cannot be reached, refuses this client, or lost its workers."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection to Ray. `ray` is the module, the others what it has in all."""

    ray: Any
    address: str
    nodes: int
    cpus: int
    gpus: int

    @property
    def serve(self) -> Any:
        """The module `ray.serve`."""
        return importlib.import_module("ray.serve")


@contextmanager
def connected(address: str | None, *, num_workers: int) -> Iterator[Cluster]:
    """Connect for the length of a block; `address` None starts a cluster on this machine.

    An own cluster ends with the block, and with this process should it be killed. `address` is
    HOST:PORT of a running cluster's head or `auto` for the one that this machine is a node of; its
    token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. One process has one
    connection. Blocks; takes seconds. Raises UsageError, ClusterError, ModuleNotFoundError.
    """
    _use_tokens(address)
    ray = importlib.import_module("ray")
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST_RAY:
        raise UsageError(
            f"ray {ray.__version__} knows no tokens; pip install 'ray>={OLDEST_RAY[0]}."
            f"{OLDEST_RAY[1]}'"
        )
    try:
        context = _start(ray, num_workers) if address is None else _join(ray, address)
        # Asked at once: a wrong token is noticed by the first question only.
        resources, nodes = ray.cluster_resources(), ray.nodes()
    except ray.exceptions.AuthenticationError:
        ray.shutdown()
        raise ClusterError(
            f"the cluster at {address} does not accept this token; give the cluster's own in "
            "RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
        ) from None
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        if address is None:
            raise ClusterError(f"no Ray cluster on this machine: {_first_line(error)}") from error
        # Of a wrong token Ray's own client says no more than of a wrong address.
        raise ClusterError(
            f"no Ray cluster at {address}: {_first_line(error)}; check the address, that this "
            "machine is a node of the cluster, and that the token is the cluster's own "
            "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
        ) from error
    try:
        yield Cluster(
            ray,
            context.address_info["gcs_address"],
            sum(1 for node in nodes if node["Alive"]),
            int(resources.get("CPU", 0)),
            int(resources.get("GPU", 0)),
        )
    finally:
        ray.shutdown()


def _use_tokens(address: str | None) -> None:
    """Set up this process's environment, which Ray reads when it is imported, and its children's.

    UsageError where tokens are turned off, or a running cluster's token is nowhere to be found.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise UsageError(
            f"RAY_AUTH_MODE={mode}: without a token, whoever reaches the cluster's ports can run "
            "code on it; unset it, or set it to token"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would hide GPUs from an actor that asks for none, and warns that it soon will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if _has_token():
        return
    if address is not None:
        raise UsageError(
            f"no token for the cluster at {address}: give its own in RAY_AUTH_TOKEN, in a file "
            "named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token (`ray get-auth-token "
            "--generate` makes one, to be copied to every node)"
        )
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / _TOKEN_FILE).is_file()


def _start(ray: Any, num_workers: int) -> Any:
    return ray.init(
        address="local",
        # One CPU a worker at least, so that a small machine can be tried out as a large one.
        num_cpus=max(os.cpu_count() or 1, num_workers),
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(ray: Any, address: str) -> Any:
    if "://" in address:
        raise UsageError(
            f"address {address!r}; accepted are HOST:PORT of a cluster that this machine is a node "
            "of (`ray start --address=HOST:PORT`), or auto"
        )
    return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
