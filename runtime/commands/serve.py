"""`outrider serve`: the engine behind a ZeroMQ socket, until it is told to stop."""

import logging
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ..cli import INTERRUPTED
from ..config import OPTION_NAMES, resolve_config
from ..errors import UsageError
from ..provenance import DEFAULT, gather
from . import options
from .display import print_json, print_rows, progress_bars
from .startup import heavy_imports

app = typer.Typer(add_completion=False)

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=65_536)]


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the server may be told; INTERFACES section 1."""

    bind: str | None = None
    keys: str | None = None
    shutdown_timeout: _Seconds = 30.0
    slow_consumer_timeout: _Seconds = 30.0
    watchdog: _Seconds = 300.0
    max_running: _Count = 8
    max_waiting: _Count = 64
    max_per_client: _Count = 64
    prefill_tokens: _Count = 512
    prefix_cache: bool = True
    log_prompts: bool = False
    log_level: str = "info"
    replicas: str | None = None
    address: str | None = None
    http: str = "127.0.0.1:8000"
    api_key_file: str | None = None

    def __post_init__(self) -> None:
        if self.log_level not in _LEVELS:
            raise ValueError(f"log_level is {self.log_level!r}: accepted are {', '.join(_LEVELS)}")
        refuse = _ONE_SERVER if self.replicas is not None else _MANY_SERVERS
        for name in refuse:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {refuse[name]}")


_LEVELS = ("debug", "info", "warning", "error")
_ONE_SERVER = {
    "bind": "is one server's address; replicas have their own, give --http",
    "keys": "is for ZeroMQ clients; replicas are reached over HTTP, give --api-key-file",
}
_MANY_SERVERS = {"address": "is for replicas on a cluster; add --replicas N"}
_NAMES = ServeOptions.__struct_fields__
# How long the engine's thread and the socket's may keep the interpreter from each other. With the
# default of 5 ms a token waits longer than the socket's thread has work (measured: bench/LOG.md).
_SWITCH_S = 1e-4
# Of the memory for keys and values, what prompts of requests that ended may hold.
_PREFIX_SHARE = 0.125


def _serve(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Server options", show_default=False)


def _replicas(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Replicas", show_default=False)


@app.command()
def serve(
    model: options.Model = None,
    bind: Annotated[
        str | None, _serve("ipc:///PATH or tcp://127.0.0.1:PORT [ipc in your runtime folder]")
    ] = None,
    keys: Annotated[
        Path | None, _serve("folder of CURVE keys; clients need one that it allows")
    ] = None,
    make_keys: Annotated[
        Path | None, _serve("write new keys for a server and a client into a folder, and stop")
    ] = None,
    shutdown_timeout: Annotated[
        float | None, _serve("seconds for open requests to end after the first SIGTERM [30]")
    ] = None,
    slow_consumer_timeout: Annotated[
        float | None, _serve("seconds after which a client that takes nothing is cut off [30]")
    ] = None,
    watchdog: Annotated[
        float | None, _serve("seconds without progress after which the engine is given up [300]")
    ] = None,
    max_running: Annotated[int | None, _serve("requests that share a pass [8]")] = None,
    max_waiting: Annotated[int | None, _serve("requests that may wait beyond those [64]")] = None,
    max_per_client: Annotated[int | None, _serve("open requests of one client [64]")] = None,
    prefill_tokens: Annotated[
        int | None, _serve("prompt tokens that a pass takes beside running streams [512]")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        _serve("keep prompts' keys and values for requests that begin alike [on]"),
    ] = None,
    log_prompts: Annotated[
        bool | None, _serve("write prompts into the log (with --log-level debug)")
    ] = None,
    log_level: Annotated[str | None, _serve("debug, info, warning or error [info]")] = None,
    replicas: Annotated[
        str | None,
        _replicas("N engines on Ray, or MIN:MAX by load, behind one HTTP address [none]"),
    ] = None,
    address: Annotated[
        str | None,
        _replicas("running Ray cluster: HOST:PORT or auto [one of this machine's own]"),
    ] = None,
    http: Annotated[
        str | None, _replicas("address of the HTTP API in front of them [127.0.0.1:8000]")
    ] = None,
    api_key_file: Annotated[
        Path | None, _replicas("file of API keys, one a line, mode 0600; needed off this machine")
    ] = None,
    device: options.Device = None,
    revision: options.Revision = None,
    expert_memory: options.ExpertMemory = None,
    host_memory: options.HostMemory = None,
    format: options.Format = None,
    dense_format: options.DenseFormat = None,
    dtype: options.Dtype = None,
    predictor: options.Predictor = None,
    prefetch: options.Prefetch = None,
    eviction: options.Eviction = None,
    on_miss: options.OnMiss = None,
    verify_on_load: options.VerifyOnLoad = None,
    num_threads: options.NumThreads = None,
    store: options.Store = None,
    config: options.ConfigFile = None,
    print_config: options.PrintConfig = False,
    json: options.Json = False,
) -> None:
    """Serve generation over ZeroMQ: many clients, one engine.

    The address goes to stdout once clients can connect, the log to stderr as JSON lines. The first
    SIGTERM or Ctrl-C lets open requests finish, the second ends them.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if make_keys is not None:
        _make_keys(make_keys)
        return
    engine_config, sources = resolve_config(
        {name: value for name, value in given.items() if name in OPTION_NAMES},
        os.environ,
        config,
        other_names=_NAMES,
    )
    settings, serve_sources = _settings(given, config)
    if print_config:
        rows = options.describe(engine_config, None, sources) + [
            {
                "option": name,
                "value": getattr(settings, name),
                "source": serve_sources[name].source,
                "where": serve_sources[name].where,
            }
            for name in _NAMES
        ]
        if json:
            print_json({"rows": rows})
        else:
            columns = {"option": "option", "value": "value", "where": "where from"}
            print_rows(rows, columns=columns)
        return
    if settings.replicas is not None:
        from .replicas import serve_replicas

        serve_replicas(
            model, engine_config, sources, settings=settings, serve_sources=serve_sources,
            store=store,
        )  # fmt: skip
        return
    from ..serving import endpoint, log
    from ..serving.keys import server_keys

    # Everything that can be refused is, before seconds go into loading a model.
    served_at = endpoint.parse(settings.bind or endpoint.default_address())
    pair = None if settings.keys is None else server_keys(Path(settings.keys))
    endpoint.refuse_exposed(served_at, has_keys=pair is not None)
    with endpoint.Claim(served_at):
        log.write_to_stderr(getattr(logging, settings.log_level.upper()))
    with heavy_imports():
        from ..engine import Engine
        from ..scheduler import BatchLimits
    log.adopt("transformers")
    from ..serving.backend import EngineBackend
    from ..serving.health import Patience
    from ..serving.server import Server, ServerOptions

    limits = BatchLimits(
        max_num_seqs=settings.max_running,
        max_num_batched_tokens=max(2048, settings.max_running + settings.prefill_tokens),
        max_prefill_tokens=settings.prefill_tokens,
        prefix_share=_PREFIX_SHARE if settings.prefix_cache else 0.0,
    )
    with progress_bars() as progress:
        engine = Engine.from_config(
            engine_config, model=model, store=store, limits=limits, progress=progress
        )
    server = Server(
        EngineBackend(engine, name=model or "nano"),
        served_at,
        keys=pair,
        options=ServerOptions(
            max_waiting=settings.max_waiting,
            max_per_client=settings.max_per_client,
            shutdown_timeout_s=settings.shutdown_timeout,
            slow_consumer_s=settings.slow_consumer_timeout,
            patience=Patience(stalled_s=min(10.0, settings.watchdog / 2), dead_s=settings.watchdog),
            logs_prompts=settings.log_prompts,
        ),
        version=version("outrider"),
    )
    interrupted = _stop_on_signals(server)
    sys.setswitchinterval(_SWITCH_S)
    code = server.run(on_bound=lambda bound: typer.echo(bound))
    is_over = server.close()
    if not is_over:
        # The engine's thread hangs, and the interpreter would wait for it for ever.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code or 1)
    if code or interrupted:
        raise typer.Exit(code or INTERRUPTED)


def _settings(given: dict[str, Any], file: Path | None) -> tuple[ServeOptions, dict[str, Any]]:
    cli = {name: value for name, value in given.items() if name in _NAMES}
    for name in ("keys", "api_key_file"):
        if name in cli:
            cli[name] = str(cli[name])
    found = gather(_NAMES, cli, os.environ, file, other_names=OPTION_NAMES)
    values = {name: value for name, (value, _) in found.items()}
    try:
        settings = msgspec.convert(values, ServeOptions, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"server options: {error}") from None
    return settings, {name: found[name][1] if name in found else DEFAULT for name in _NAMES}


def _make_keys(folder: Path) -> None:
    from ..serving.keys import make_keys

    for file in make_keys(folder):
        typer.echo(file)


def _stop_on_signals(server: Any) -> list[int]:
    """Stop the server on SIGTERM and SIGINT; the list fills with SIGINTs."""
    interrupted: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            interrupted.append(number)
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return interrupted
