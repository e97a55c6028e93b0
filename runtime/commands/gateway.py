"""`outrider gateway`: OpenAI's HTTP API, metrics and a live page in front of a running server."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..sizes import parse_bytes
from .startup import heavy_imports

if TYPE_CHECKING:
    from ..serving.gateway.upstream import EngineClient

app = typer.Typer(add_completion=False)

_LOG = logging.getLogger("outrider.gateway")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s]+)):([0-9]{1,5})")
_MIN_BODY_BYTES = 1024


def _option(help_text: str, variable: str) -> Any:
    return typer.Option(help=help_text, envvar=f"OUTRIDER_{variable}", show_envvar=True)


@app.command()
def gateway(
    connect: Annotated[
        str | None, _option("the server: ipc://PATH or tcp://ADDRESS:PORT [your own]", "CONNECT")
    ] = None,
    http: Annotated[str, _option("address to listen on", "HTTP")] = "127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None,
        _option("file of API keys, one a line, mode 0600; needed off this machine", "API_KEY_FILE"),
    ] = None,
    keys: Annotated[
        Path | None, _option("folder of this client's keys, if the server wants any", "KEYS")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="seconds of silence after which the server counts as gone")
    ] = 5.0,
    max_body: Annotated[str, typer.Option(help="largest body of a request")] = "4MiB",
    shutdown_timeout: Annotated[
        float, typer.Option(help="seconds for open requests to end after the first signal")
    ] = 30.0,
) -> None:
    """Serve OpenAI's HTTP API in front of `outrider serve`, with metrics and a live page at /.

    Without --api-key-file only this machine is served, and only addresses of this machine can be
    listened on. The URL goes to stdout once it is served; the log is JSON lines on stderr and holds
    no prompts.
    """
    address = parse_http(http)
    for name, value in (("timeout", timeout), ("shutdown-timeout", shutdown_timeout)):
        if not 0 < value <= 86_400:
            raise UsageError(f"{name}: {value:g}; accepted is above 0 to 86400 seconds")
    max_body_bytes = parse_bytes(max_body)
    if max_body_bytes < _MIN_BODY_BYTES:
        raise UsageError(f"max-body: {max_body}; at least {_MIN_BODY_BYTES} bytes are needed")
    with heavy_imports():
        from ..serving.client import AsyncClient

    client = AsyncClient(connect, timeout_s=timeout, keys=keys, name="outrider gateway")
    stand_in_front(
        client,
        client.address,
        http=address,
        api_key_file=api_key_file,
        max_body_bytes=max_body_bytes,
        shutdown_timeout_s=shutdown_timeout,
    )


def stand_in_front(
    client: "EngineClient",
    name: str,
    *,
    http: tuple[str, int],
    api_key_file: Path | None,
    max_body_bytes: int = 4 << 20,
    shutdown_timeout_s: float,
) -> None:
    """Serve HTTP for `client` until a signal; `name` is what the log calls it. Main thread only."""
    from ..serving import log
    from ..serving.gateway.access import check_address
    from ..serving.gateway.app import make_app
    from ..serving.gateway.generation import Settings
    from ..serving.gateway.keys import ApiKeys
    from ..serving.gateway.listener import bind, serve
    from ..serving.gateway.upstream import Upstream

    host, port = http
    check_address(host, has_keys=api_key_file is not None)
    api_keys = None if api_key_file is None else ApiKeys.read(api_key_file)
    settings = Settings(max_body_bytes=max_body_bytes)
    application = make_app(Upstream(client), keys=api_keys, settings=settings)
    log.write_to_stderr()
    # What it says of its own starting and stopping, this command says once.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    listening = bind(host, port, write_timeout_s=settings.write_timeout_s)

    def on_started() -> None:
        bound = listening.getsockname()
        url = f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}"
        typer.echo(url)
        log.event(_LOG, logging.INFO, "listening", url=url, server=name, keys=bool(api_keys))

    serve(application, listening, shutdown_timeout_s=shutdown_timeout_s, on_started=on_started)


def parse_http(address: str) -> tuple[str, int]:
    """HOST:PORT, [IPv6]:PORT; port 0 picks a free one."""
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[3]) > 65_535:
        raise UsageError(
            f"http: {address!r}; accepted is HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000"
        )
    return found[1] or found[2], int(found[3])
