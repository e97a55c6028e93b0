"""`outrider bench serve`: options and table of a server under load.

The runtime never imports what measures it: the module is named by string.
"""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from ..provenance import DEFAULT
from . import options
from .display import print_json, progress_bars
from .startup import heavy_imports


def serve(
    model: options.Model = None,
    clients: Annotated[
        str, typer.Option(help="how many clients at once, with commas")
    ] = "1,2,4,8,16",
    requests: Annotated[int, typer.Option(help="of each client, one after the other")] = 4,
    tokens: Annotated[int, typer.Option(help="tokens to generate a request")] = 32,
    prompts: Annotated[
        str, typer.Option(help="built-in (held-out text), or a file with a text a line")
    ] = "built-in",
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt")] = 16,
    idle: Annotated[int, typer.Option(help="clients that are connected and say nothing")] = 64,
    repetitions: Annotated[int, typer.Option(help="timed runs of each level, in turns")] = 3,
    max_running: Annotated[int, typer.Option(help="requests that share a pass")] = 16,
    json: options.Json = False,
    revision: options.Revision = None,
    expert_memory: options.ExpertMemory = None,
    format: options.Format = None,
    dtype: options.Dtype = None,
    predictor: options.Predictor = None,
    prefetch: options.Prefetch = None,
    eviction: options.Eviction = None,
    num_threads: options.NumThreads = None,
    store: options.Store = None,
    config: options.ConfigFile = None,
) -> None:
    """Latencies and throughput of a server under 1 to 16 clients, beside the engine by itself.

    The server is started for the measurement, on a socket of its own. Keys of --json are those of
    `vllm bench serve`, with an "experts" object. One client must get the engine's own tokens, or no
    speed is shown and the exit code is 1.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    engine, sources = options.engine_config(given, config)
    with heavy_imports():
        module: Any = importlib.import_module("outrider.bench.serve")
    shared = {name: getattr(engine, name) for name in sources if sources[name] != DEFAULT}
    try:
        levels = tuple(int(number) for number in clients.split(","))
    except ValueError:
        raise UsageError(f"clients: {clients!r}; accepted are whole numbers with commas") from None
    wanted = module.ServeOptions(
        model=model,
        engine={name: str(v) if isinstance(v, Path) else v for name, v in shared.items()},
        store=None if store is None else str(store),
        clients=levels,
        requests=requests,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        num_tokens=tokens,
        num_idle=idle,
        repetitions=repetitions,
        max_running=max_running,
    )
    with progress_bars() as progress:
        document = module.bench_serve(wanted, progress=progress)
    if json:
        print_json(document)
        return
    _print(document)


_COLUMNS = (
    "clients", "tokens\n/s", "ratio", "requests\n/s", "TTFT ms\nmedian", "\np99", "TPOT ms\nmedian",
    "ITL ms\np99", "MB read\n/token", "hits", "failed",
)  # fmt: skip


def _print(document: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["rows"]:
        hits = row["experts"]["hit_rate"]
        table.add_row(
            str(row["max_concurrency"]),
            f"{row['output_throughput']:.1f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['request_throughput']:.2f}",
            f"{row['median_ttft_ms']:.1f}",
            f"{row['p99_ttft_ms']:.1f}",
            f"{row['median_tpot_ms']:.1f}",
            f"{row['p99_itl_ms']:.1f}",
            f"{row['experts']['bytes_per_token'] / 1e6:.2f}",
            "" if hits is None else f"{100 * hits:.0f}%",
            str(row["failed"]),
        )
    Console(highlight=False).print(table)
    server, idle = document["server"], document["idle_clients"]
    typer.echo(
        f"One client against the engine alone: time per token {server['tpot_ratio']['median']:.3f} "
        f"[{server['tpot_ratio']['low']:.3f}, {server['tpot_ratio']['high']:.3f}], first token "
        f"{server['ttft_added_ms']['median']:+.2f} ms; the same tokens."
    )
    typer.echo(
        f"With {idle['clients']} idle clients: time per token {idle['tpot_ratio']['median']:.3f} "
        f"[{idle['tpot_ratio']['low']:.3f}, {idle['tpot_ratio']['high']:.3f}] of that without."
    )
    surroundings = document["environment"]
    typer.echo(
        f"{surroundings['cpu']}, {surroundings['num_cpus']} processors, load average "
        + " to ".join(f"{load:.1f}" for load in surroundings["load_average"])
        + "."
    )
