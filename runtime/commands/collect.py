"""`outrider collect`: puts a model, the corpora and the collector together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from ..config import OPTION_NAMES, EngineConfig, resolve_config
from ..errors import UsageError
from ..provenance import gather
from ..sizes import format_bytes
from . import options
from .dataset_bars import dataset_bars
from .display import print_json, print_rows, progress_bars, stderr_console

if TYPE_CHECKING:
    from ...collect import CollectSettings, ModelShape
    from ...collect.collection import CollectReport
    from ...collect.corpora.corpus import Corpus

app = typer.Typer(add_completion=False)

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_ENGINE_NAMES = (
    "expert_memory",
    "format",
    "dtype",
    "device",
    "revision",
    "eviction",
    "verify_on_load",
    "num_threads",
)


class CollectOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `collect` itself takes, apart from the engine's options."""

    datasets: str | list[str] = "offline"
    traces: int = 20_000
    context_tokens: int = 64
    batch_size: int | None = None
    hidden_states: str | list[str] = "ensemble"
    probabilities: str = "log8"
    load_in_4bit: bool = False
    max_memory: str | list[str] | None = None
    seed: int = 0
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: Annotated[int, msgspec.Meta(ge=1, le=65_536)] | None = None

    def __post_init__(self) -> None:
        for name in ("address", "workers"):
            if self.engine == "local" and getattr(self, name) is not None:
                raise ValueError(f"--{name} is for workers of a cluster; add --engine ray")


@app.command()
def collect(
    model: options.Model = None,
    out: Annotated[Path | None, typer.Option(help="folder for the traces")] = None,
    datasets: Annotated[
        str | None,
        typer.Option(
            help="comma-separated: imdb, yelp, agnews, squad, amazon, dbpedia, offline, one of the "
            "offline domains, text:PATH [offline]"
        ),
    ] = None,
    traces: Annotated[int | None, typer.Option(help="samples in all [20000]")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="tokens a sample [64]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="samples a pass [by the device's memory]")
    ] = None,
    hidden_states: Annotated[
        str | None,
        typer.Option(help="router inputs to keep: none, ensemble, all, or layers 0,3 [ensemble]"),
    ] = None,
    probabilities: Annotated[
        str | None, typer.Option(help="router log-probabilities: log8, fp16, none [log8]")
    ] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option("--load-in-4bit", help="nf4 weights by bitsandbytes, experts included"),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="accelerate's offload by device, such as 0:20GiB,cpu:16GiB"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on with what the folder has begun")] = False,
    seed: Annotated[int | None, typer.Option(help="decides which text is taken [0]")] = None,
    engine: Annotated[
        str | None, typer.Option(help="local, or ray: workers of a Ray cluster [local]")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="running Ray cluster: HOST:PORT or auto [one of this machine's own]"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray workers, each with the model [one a GPU, else a node]")
    ] = None,
    json: options.Json = False,
    expert_memory: options.ExpertMemory = None,
    format: options.Format = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    eviction: options.Eviction = None,
    verify_on_load: options.VerifyOnLoad = None,
    num_threads: options.NumThreads = None,
    store: options.Store = None,
    config: options.ConfigFile = None,
    print_config: options.PrintConfig = False,
) -> None:
    """Record which experts a model chooses on text, token by token and layer by layer.

    Balanced over the data sets, deterministic by seed, resumable; a shard is the unit of commit.
    Progress goes to stderr and to OUT/collection.log.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    settings, wanted, rows = _resolved(given, config)
    if print_config:
        if json:
            print_json({"rows": rows})
        else:
            headings = {"option": "option", "value": "value", "where": "where from"}
            print_rows(rows, columns=headings)
        return
    if out is None:
        raise UsageError("no folder for the traces: give --out DIR")
    settings = _as_begun(settings, given, out) if resume else settings
    report, document = _run(model, out, settings, wanted, store=store, resume=resume)
    if json:
        print_json(document)
        return
    overall = report.overall
    assert overall is not None
    most, least = overall.most_used, overall.least_used
    for line in (
        f"{document['traces']} traces, {document['tokens']} tokens, "
        f"{format_bytes(document['bytes'])} in {out}",
        f"{document['traces_per_minute']:.0f} traces a minute, "
        f"{document['bytes'] / max(document['traces'], 1):.0f} bytes a trace",
        f"coverage {overall.coverage:.1%}, {overall.unique_pairs} unique pairs, "
        f"routing entropy {overall.routing_entropy:.2f} bits, "
        f"{overall.experts_per_layer:.1f} experts a layer",
        f"most used expert {most[0]}:{most[1]} ({most[2]:.1%} of tokens), "
        f"least used {least[0]}:{least[1]} ({least[2]:.1%})",
    ):
        typer.echo(line)


def _resolved(
    given: Mapping[str, Any], file: Path | None
) -> tuple[EngineConfig, CollectOptions, list[dict[str, object]]]:
    """Both parts of the configuration, and the rows of --print-config."""
    own = CollectOptions.__struct_fields__
    engine_given = {name: value for name, value in given.items() if name in _ENGINE_NAMES}
    # Texts are not decoded token by token here, so there is nothing for a predictor to do.
    fixed = {"predictor": "none", "prefetch": "off"}
    engine, engine_sources = resolve_config(engine_given | fixed, os.environ, file, other_names=own)
    own_given = {name: value for name, value in given.items() if name in own}
    found = gather(own, own_given, os.environ, file, other_names=OPTION_NAMES)
    values = {name: value for name, (value, _) in found.items()}
    try:
        wanted = msgspec.convert(values, CollectOptions, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from error
    rows: list[dict[str, object]] = []
    for name in own:
        where = found[name][1] if name in found else None
        rows.append(_row(name, getattr(wanted, name), where))
    rows += [_row(name, getattr(engine, name), engine_sources[name]) for name in _ENGINE_NAMES]
    return engine, wanted, rows


def _row(name: str, value: object, where: Any) -> dict[str, object]:
    source = "default" if where is None else where.source
    return {
        "option": name,
        "value": value,
        "source": source,
        "where": "default" if where is None else where.where,
    }


def _as_begun(engine: EngineConfig, given: Mapping[str, Any], out: Path) -> EngineConfig:
    """What a resume takes from the manifest: products on the CPU change bits with dtype and
    threads.
    """
    from ...collect.trace.manifest import MANIFEST_NAME, read_manifest

    if not (out / MANIFEST_NAME).exists():
        return engine
    manifest = read_manifest(out)
    values = {name: getattr(engine, name) for name in OPTION_NAMES}
    values["num_threads"] = manifest.threads
    if "dtype" not in given and manifest.dtype in _DTYPES:
        values["dtype"] = _DTYPES[manifest.dtype]
    return EngineConfig(**values)


def _run(
    model: str | None,
    out: Path,
    engine: EngineConfig,
    wanted: CollectOptions,
    *,
    store: Path | None,
    resume: bool,
) -> tuple[CollectReport, dict[str, Any]]:
    from ...collect import CollectSettings, TraceReader, open_corpora
    from ...collect.analysis import analyze, write_analysis
    from ...collect.analysis.document import ANALYSIS_NAME
    from ..traced import parse_max_memory

    settings = CollectSettings(
        traces=wanted.traces,
        context_tokens=wanted.context_tokens,
        batch_size=wanted.batch_size,
        hidden_states=_joined(wanted.hidden_states),
        probabilities=wanted.probabilities,  # type: ignore[arg-type]
        seed=wanted.seed,
    )
    corpora = open_corpora(_joined(wanted.datasets).split(","))
    limits = parse_max_memory(_joined(wanted.max_memory)) if wanted.max_memory else None
    source: dict[str, Any] = {
        "load_in_4bit": wanted.load_in_4bit, "max_memory": limits, "store": store,
    }  # fmt: skip
    take = _on_cluster if wanted.engine == "ray" else _here
    report, seconds = take(
        model, engine, wanted, corpora, settings, source=source, out=out, resume=resume
    )
    # Without clusters: those take a second a layer, which `outrider analyze` has the time for.
    write_analysis(analyze([TraceReader(out)], num_clusters=0), out / ANALYSIS_NAME)
    return report, _document(report, seconds)


def _here(
    model: str | None,
    engine: EngineConfig,
    wanted: CollectOptions,
    corpora: Sequence[Corpus],
    settings: CollectSettings,
    *,
    source: Mapping[str, Any],
    out: Path,
    resume: bool,
) -> tuple[CollectReport, float]:
    """The report, and the seconds after loading."""
    from ...collect import collect as collect_traces
    from ..traced import open_traced

    with progress_bars() as progress:
        traced = open_traced(model, engine, progress=progress, **source)
    with traced:
        state_bytes = next(traced.model.parameters()).element_size()
        _announce(traced.shape, state_bytes, settings, out)
        began = time.monotonic()
        with dataset_bars() as tell:
            report = collect_traces(
                traced.model,
                traced.tokenizer,
                corpora,
                shape=traced.shape,
                out=out,
                settings=settings,
                model_name=traced.name,
                model_format=traced.format,
                kernels=traced.kernels,
                resume=resume,
                progress=tell,
            )
    return report, time.monotonic() - began


def _on_cluster(
    model: str | None,
    engine: EngineConfig,
    wanted: CollectOptions,
    corpora: Sequence[Corpus],
    settings: CollectSettings,
    *,
    source: Mapping[str, Any],
    out: Path,
    resume: bool,
) -> tuple[CollectReport, float]:
    """As `_here`; the seconds are those after the cluster has started."""
    from ..scaleout.cluster import connected

    with connected(wanted.address, num_workers=wanted.workers or 1) as cluster:
        # Only now: without Ray this has been refused in a moment.
        from ..scaleout.collection import TracedSource, collect_on_cluster

        num_workers = wanted.workers or cluster.gpus or cluster.nodes
        threads = engine.num_threads or max(1, cluster.cpus // num_workers)
        began = time.monotonic()
        with dataset_bars() as tell:
            report = collect_on_cluster(
                cluster,
                TracedSource(model=model, config=replace(engine, num_threads=threads), **source),
                corpora,
                out=out,
                settings=replace(settings, num_workers=num_workers),
                resume=resume,
                announce=lambda facts: _announce(facts.shape, facts.state_bytes, settings, out),
                progress=tell,
            )
    return report, time.monotonic() - began


def _document(report: CollectReport, seconds: float) -> dict[str, Any]:
    manifest, shape = report.manifest, report.manifest.shape
    return {
        "traces": manifest.num_finished,
        "tokens": sum(shard.num_tokens for shard in manifest.shards),
        "seconds": round(seconds, 3),
        "collecting_s": round(report.seconds, 3),
        "forward_s": round(report.forward_s, 3),
        "new_traces": report.new_traces,
        "traces_per_minute": round(60 * report.new_traces / max(seconds, 1e-9), 1),
        "bytes": report.nbytes,
        "datasets": {
            name: {
                "traces": dataset.num_samples,
                "coverage": round(report.datasets[name].coverage, 5),
                "unique_pairs": report.datasets[name].unique_pairs,
                "routing_entropy": round(report.datasets[name].routing_entropy, 5),
            }
            for dataset in manifest.datasets
            for name in (dataset.name,)
        },
        "top_k": shape.top_k,
        "num_experts": shape.num_experts,
        "moe_layers": shape.num_moe_layers,
        "format": manifest.format,
        "dtype": manifest.dtype,
        "batch_size": manifest.batch_size,
        "threads": manifest.threads,
    }


def _announce(shape: ModelShape, state_bytes: int, settings: CollectSettings, out: Path) -> None:
    """Say how large it gets before it starts; refuse what the disk cannot hold even when packed."""
    from ...collect.errors import OutOfSpaceError
    from ...collect.settings import estimate_bytes

    at_most = estimate_bytes(shape, settings, state_bytes=state_bytes)
    existing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    stderr_console().print(
        f"{settings.traces} traces of {settings.context_tokens} tokens: up to "
        f"{format_bytes(at_most)} before packing, {format_bytes(free)} free at {existing}",
        soft_wrap=True,
    )
    if at_most // 2 > free:
        raise OutOfSpaceError(
            f"the traces take up to {format_bytes(at_most)} and {format_bytes(free)} are free at "
            f"{str(existing)!r}; choose another folder, fewer --traces, or --hidden-states none"
        )


def _joined(value: str | list[str]) -> str:
    """A list in a configuration file means the same as commas on the command line."""
    return value if isinstance(value, str) else ",".join(value)
