"""`outrider serve --replicas`: engines on a Ray cluster behind the gateway's HTTP API."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig
from ..errors import OutriderError, UsageError
from ..provenance import DEFAULT, Provenance
from .gateway import parse_http, stand_in_front
from .startup import heavy_imports

if TYPE_CHECKING:
    from .serve import ServeOptions

_COUNT = re.compile(r"([0-9]{1,4})(?::([0-9]{1,4}))?")
# What this process settles for all replicas, and what is not the servers' business.
_OURS = ("replicas", "address", "http", "api_key_file", "bind", "keys")


def serve_replicas(
    model: str | None,
    engine: EngineConfig,
    sources: Mapping[str, Provenance],
    *,
    settings: "ServeOptions",
    serve_sources: Mapping[str, Provenance],
    store: Path | None,
) -> None:
    """Serve until a signal. Raises UsageError for what cannot be, before anything is started."""
    assert settings.replicas is not None
    least, most = parse_replicas(settings.replicas)
    http = parse_http(settings.http)
    with heavy_imports():
        from ..scaleout.cluster import connected
        from ..serving.gateway.access import check_address
        from ..serving.gateway.keys import ApiKeys

    keys = None if settings.api_key_file is None else Path(settings.api_key_file)
    check_address(http[0], has_keys=keys is not None)
    if keys is not None:
        ApiKeys.read(keys)
    with connected(settings.address, num_workers=most) as cluster:
        with heavy_imports():
            from ..scaleout.replicas import ReplicaPlan, start_replicas

        gpus = 1 if engine.device.startswith("cuda") or (
            engine.device == "auto" and cluster.gpus
        ) else 0  # fmt: skip
        threads = engine.num_threads or max(1, cluster.cpus // most)
        environment = _environment(engine, sources) | _environment(settings, serve_sources)
        words = [*([model] if model else []), *(["--store", str(store)] if store else [])]
        plan = ReplicaPlan(
            words=words,
            environment=environment | {"OUTRIDER_NUM_THREADS": str(threads)},
            min_replicas=least,
            max_replicas=most,
            cpus=1 if gpus else threads,
            gpus=gpus,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            shutdown_timeout_s=settings.shutdown_timeout,
        )
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            replicas = start_replicas(cluster, plan)
        except RuntimeError as error:
            raise OutriderError(f"the replicas cannot be started: {error}") from error
        with replicas:
            stand_in_front(
                replicas.client,
                f"{settings.replicas} replicas",
                http=http,
                api_key_file=keys,
                shutdown_timeout_s=settings.shutdown_timeout,
            )


def parse_replicas(text: str) -> tuple[int, int]:
    """`2` or `1:4` as least and most. UsageError for anything else."""
    found = _COUNT.fullmatch(text)
    least = int(found[1]) if found else 0
    most = int(found[2] or found[1]) if found else 0
    if not 1 <= least <= most:
        raise UsageError(
            f"replicas {text!r}: accepted are a number such as 2, or the least and the most of "
            "them such as 1:4"
        )
    return least, most


def _environment(values: Any, sources: Mapping[str, Provenance]) -> dict[str, str]:
    """What was asked for, as variables that each server reads; what was not stays its default."""
    given = {
        name: getattr(values, name)
        for name, source in sources.items()
        if source != DEFAULT and name not in _OURS
    }
    return {
        f"OUTRIDER_{name.upper()}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    } | {
        f"OUTRIDER_{name.upper()}": "" for name in _OURS if f"OUTRIDER_{name.upper()}" in os.environ
    }
