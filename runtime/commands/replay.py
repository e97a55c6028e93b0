"""`outrider bench hit-rate` and `simulate`: options and tables of what is replayed, not run.

The runtime never imports what replays: modules are named by string and imported when called.
"""

import importlib
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..sizes import parse_bytes
from . import options
from .display import print_json, progress_bars, stderr_console
from .replay_tables import print_fit, print_hit_rates, print_simulation, print_validation
from .startup import heavy_imports

_PACKAGE = "outrider.bench"
_BUDGETS = "5%,10%,25%,50%,75%"
_POLICIES = "lru,lfu,layer-lru,layer-lfu,layer-ucp,static,forecast,belady"
_PREDICTORS = "random,frequent,statistics,oracle"
_SAMPLE_TOKENS = 1500

Traces = Annotated[
    list[Path] | None,
    typer.Argument(help="trace folders of one model [the built-in model on its sample text]"),
]
Policies = Annotated[str, typer.Option(help="demand-only rows, with commas")]
Predictors = Annotated[
    str,
    typer.Option(help="names or folders made by outrider train, with commas; none for no such row"),
]
Budgets = Annotated[str, typer.Option(help="shares of all routed experts, with commas")]
Links = Annotated[
    list[str] | None,
    typer.Option("--link", help="speed of the link, 25GB/s; may be repeated [the device's]"),
]
Format = Annotated[str, typer.Option(help="of the experts: fp32, bf16, int8, int4, nf4")]
Tokens = Annotated[int | None, typer.Option(min=1, help="tokens to replay at most")]
Split = Annotated[str, typer.Option(help="train, validation, test, or all")]
PromptTokens = Annotated[
    int, typer.Option(min=1, help="of each sequence: seen by predictors, not counted")
]
WithPrompts = Annotated[
    bool, typer.Option("--with-prompts", help="let prompts pass through the cache as well")
]
Prefetch = Annotated[str, typer.Option(help="on, auto (the controller decides), or off")]
Eviction = Annotated[
    str | None, typer.Option(help="policy of the rows that prefetch [the engine's default]")
]
Seed = Annotated[int, typer.Option(min=0, help="of random forecasts, fits and resamples")]
Workers = Annotated[int | None, typer.Option(min=1, help="processes [one a processor]")]
Engine = Annotated[str, typer.Option(help="local, or ray: workers of a Ray cluster")]
Address = Annotated[
    str | None,
    typer.Option(help="running Ray cluster: HOST:PORT or auto [one of this machine's own]"),
]
Scratch = Annotated[
    Path | None, typer.Option(help="folder that all nodes of the cluster see [a temporary one]")
]
Plot = Annotated[Path | None, typer.Option(help="also draw the result into this PNG file")]


def hit_rate(
    traces: Traces = None,
    policies: Policies = _POLICIES,
    predictors: Predictors = _PREDICTORS,
    budgets: Budgets = _BUDGETS,
    link: Links = None,
    device: Annotated[str, typer.Option(help="profile that gives the times")] = "cpu",
    format: Format = "bf16",
    tokens: Tokens = None,
    split: Split = "test",
    prompt_tokens: PromptTokens = 4,
    with_prompts: WithPrompts = False,
    prefetch: Prefetch = "on",
    eviction: Eviction = None,
    seed: Seed = 0,
    workers: Workers = None,
    engine: Engine = "local",
    address: Address = None,
    scratch: Scratch = None,
    plot: Plot = None,
    json: options.Json = False,
) -> None:
    """Replay recorded routing through the real cache: every policy, predictor and budget.

    No model is run: hits and bytes are counted, times are simulated from a device's profile. First
    each policy without prefetching, then each predictor reading ahead. Same slots for all in a
    budget; warm rows leave out the first tokens. Belady, one cache over all layers, is the bound.
    Predictors given by name are fitted to the train split first.
    """
    with ExitStack() as stack:
        module, wanted = _wanted(
            stack,
            traces,
            {
                "policies": _names(policies),
                "predictors": tuple(name for name in _names(predictors) if name != "none"),
                "budgets": _names(budgets),
                "links": tuple(_rate(one) for one in link or ()),
                "device": device,
                "format": format,
                "tokens": tokens,
                "split": split,
                "prompt_tokens": prompt_tokens,
                "has_prompts": with_prompts,
                "prefetch": prefetch,
                "eviction": eviction,
                "seed": seed,
                "workers": workers,
            }
            | _elsewhere(stack, engine, address=address, scratch=scratch, workers=workers),
        )
        if plot is not None:
            _module("plot").require()
        with progress_bars() as progress:
            document = module.bench_hit_rate(wanted, progress=progress)
    if plot is not None:
        _module("curves").plot_hit_rates(document, plot)
    if json:
        print_json(document)
        return
    print_hit_rates(document)


def _elsewhere(
    stack: ExitStack,
    engine: str,
    *,
    address: str | None,
    scratch: Path | None,
    workers: int | None,
) -> dict[str, Any]:
    """The options that send work to a cluster; none for the engine "local"."""
    if engine not in ("local", "ray"):
        raise UsageError(f"engine {engine!r}; accepted are local, ray")
    if engine == "local":
        for name, value in (("address", address), ("scratch", scratch)):
            if value is not None:
                raise UsageError(f"--{name} is for workers of a cluster; add --engine ray")
        return {}
    from ..scaleout.cluster import connected
    from ..scaleout.executor import ClusterExecutor

    cluster = stack.enter_context(connected(address, num_workers=workers or 1))
    if cluster.nodes > 1 and scratch is None:
        raise UsageError(
            f"the cluster has {cluster.nodes} nodes: give a folder that all of them see as "
            "--scratch DIR, and traces in such a folder"
        )
    return {"cluster": ClusterExecutor(cluster), "scratch": scratch}


def simulate(
    traces: Traces = None,
    device: Annotated[
        str | None, typer.Option(help="profile of a device [rtx3090; with --fit, every one]")
    ] = None,
    model_shape: Annotated[
        str, typer.Option(help="a known shape, a config.json or the folder it is in")
    ] = "deepseek-moe-16b",
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="only say what fits and how fast at best, of a known shape or a config.json",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="of the experts: fp32, bf16, int8, int4, nf4 [bf16]")
    ] = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="tokens the KV cache holds")] = 4096,
    policies: Policies = "layer-lru,layer-lfu,forecast,belady",
    predictors: Predictors = _PREDICTORS,
    budgets: Annotated[
        str, typer.Option(help="auto (what the device has room for), shares or sizes, with commas")
    ] = "auto",
    link: Links = None,
    tokens: Tokens = None,
    split: Split = "test",
    prompt_tokens: PromptTokens = 4,
    prefetch: Prefetch = "on",
    eviction: Eviction = None,
    seed: Seed = 0,
    workers: Workers = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="folder for one token in time, as Chrome trace events (Perfetto)"),
    ] = None,
    plot: Plot = None,
    json: options.Json = False,
) -> None:
    """SIMULATED tokens per second of a model on a card that is not here.

    Replays recorded routing with the model's sizes and the device's bandwidths; nothing is run.
    Roofline: 1 / max(weights of a token / memory read, bytes the best LRU misses / link). With
    --fit MODEL no traces are needed: what fits and the bounds, from a config file alone.
    """
    with heavy_imports():
        shapes, devices = map(_module, ("model_shapes", "devices"))
    if fit is not None:
        document = _module("fit").bench_fit(
            shapes.find_geometry(fit),
            [devices.find_device(device)] if device else (),
            formats=(format,) if format else _module("fit").FORMATS,
            context_tokens=context_tokens,
        )
        if json:
            print_json(document)
        else:
            print_fit(document)
        return
    with ExitStack() as stack:
        module, wanted = _wanted(
            stack,
            traces,
            {
                "policies": _names(policies),
                "predictors": tuple(name for name in _names(predictors) if name != "none"),
                "budgets": _names(budgets),
                "links": tuple(_rate(one) for one in link or ()),
                "device": device or "rtx3090",
                "geometry": shapes.find_geometry(model_shape),
                "format": format or "bf16",
                "tokens": tokens,
                "split": split,
                "prompt_tokens": prompt_tokens,
                "prefetch": prefetch,
                "eviction": eviction,
                "seed": seed,
                "workers": workers,
            },
        )
        module = _module("simulate")
        asked = module.SimulateOptions(replay=wanted, context_tokens=context_tokens)
        if "auto" in wanted.budgets:
            # Before traces are collected or read.
            asked.fit.require()
        if plot is not None:
            _module("plot").require()
        with progress_bars() as progress:
            document = module.bench_simulate(asked, progress=progress)
    if plot is not None:
        _module("curves").plot_hit_rates(document, plot)
    if profile is not None:
        _module("timeline").write_trace(document["timelines"], profile)
    if json:
        print_json(document)
        return
    print_simulation(document)


def validate(
    geometry: Annotated[
        Path | None,
        typer.Option(help="a folder of bench make-geometry, for large experts [nano alone]"),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="texts to decode")] = 2,
    tokens: Annotated[int, typer.Option(min=8, help="tokens to decode a passage")] = 40,
    repetitions: Annotated[int, typer.Option(min=1, help="timed runs of each, in turns")] = 5,
    plot: Plot = None,
    json: options.Json = False,
) -> None:
    """Hold the simulator against this machine: calibrate on three runs, predict the others.

    Every configuration is run here, and its routing recorded; three calibrate the times, and the
    replay then predicts tokens per second of all. Minutes; on a busy machine it says little.
    """
    with heavy_imports():
        module = _module("validation.validate")
    if plot is not None:
        _module("plot").require()
    wanted = module.ValidateOptions(
        geometry=None if geometry is None else str(geometry),
        passages=passages,
        tokens=tokens,
        repetitions=repetitions,
    )
    with progress_bars() as progress:
        document = module.bench_validate(wanted, progress=progress)
    if plot is not None:
        _module("report.figures").save(_module("report.figures").scatter(document), plot)
    if json:
        print_json(document)
        return
    print_validation(document)


def _module(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _wanted(stack: ExitStack, traces: list[Path] | None, given: dict[str, Any]) -> tuple[Any, Any]:
    """The hit-rate module and its options; collects a sample where no traces were given."""
    with heavy_imports():
        module = _module("hit_rate")
        shapes, devices, forecaster = map(_module, ("model_shapes", "devices", "forecaster"))
    device = devices.find_device(given.pop("device"))
    tokens = given.pop("tokens")
    if not traces:
        stderr_console().print("no traces given: collecting some of the built-in model")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outrider-traces-")))
        traces = [_module("sample").collect_sample(folder / "traces", seed=given["seed"])]
        tokens = tokens or _SAMPLE_TOKENS
    source = forecaster.Source(
        directories=tuple(traces),
        split=given.pop("split"),
        max_tokens=tokens,
        prompt_tokens=given.pop("prompt_tokens"),
        seed=given.pop("seed"),
    )
    geometry = given.pop("geometry", None) or shapes.geometry_for(source.shape)
    if given["eviction"] is None:
        del given["eviction"]
    return module, module.HitRateOptions(source=source, device=device, geometry=geometry, **given)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _rate(text: str) -> float:
    """Bytes a second of 25GB/s or 25GB."""
    try:
        return float(parse_bytes(text.removesuffix("/s")))
    except UsageError as error:
        raise UsageError(f"link {text!r}: accepted are speeds such as 25GB/s or 500MB/s") from error
