"""`outrider bench decode`, and the checkpoints that it is meant for: options and the table."""

import importlib
import subprocess
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import OutriderError, UsageError
from ..provenance import DEFAULT
from ..sizes import format_bytes, parse_bytes
from . import options
from .display import print_json, progress_bars, stderr_console

_DEFAULT_BUDGET = "25%"
_REPETITIONS = 5
_TIME_LIMIT_S = 100.0
_LlamaPython = Annotated[
    Path | None,
    typer.Option(help="a Python that has llama-cpp-python and gguf, for llama.cpp"),
]


def _module(name: str) -> Any:
    # By name: the runtime never imports what measures it.
    return importlib.import_module(f"outrider.bench.{name}")


def decode(
    model: options.Model = None,
    expert_memory: Annotated[
        list[str] | None,
        typer.Option(help="budget of the arms that are not resident; may be repeated [25%]"),
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="with commas: resident, eager, on-demand, prefetch, prefetch:PREDICTOR, oracle, "
            "accelerate, llama.cpp, llama.cpp-resident"
        ),
    ] = "resident,on-demand,prefetch",
    tokens: Annotated[int, typer.Option(help="tokens to decode a passage")] = 24,
    prompts: Annotated[
        str,
        typer.Option(help="built-in (held-out text), built-in:DOMAIN, or a file, a text a line"),
    ] = "built-in",
    passages: Annotated[int, typer.Option(help="texts to decode, one after the other")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each text before decoding")] = 16,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="let the model go on freely; else follow the text")
    ] = False,
    repetitions: Annotated[
        int | None,
        typer.Option(help="timed runs of each arm, interleaved [5, or 3 to end within 2 minutes]"),
    ] = None,
    cold: Annotated[
        bool | None,
        typer.Option(
            "--cold/--warm", help="empty caches before each run, or not; left out, both apart"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every arm")] = None,
    seed: Annotated[int, typer.Option(help="of the places read when the link is measured")] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="for each arm that is not resident, page cache included: a size, or auto "
            "(budget, dense weights and 1 GiB); needs the right to make control groups"
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="let those arms read from disk no faster, e.g. 500MB/s"),
    ] = None,
    llama_python: _LlamaPython = None,
    gguf: Annotated[
        Path | None, typer.Option(help="the same weights for llama.cpp (outrider bench make-gguf)")
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="first whether this machine's devices compute and generate as they must",
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="also draw the result into this PNG file")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="folder for one token in time, as Chrome trace events (Perfetto)"),
    ] = None,
    json: options.Json = False,
    device: options.Device = None,
    revision: options.Revision = None,
    format: options.Format = None,
    dense_format: options.DenseFormat = None,
    dtype: options.Dtype = None,
    predictor: options.Predictor = None,
    prefetch: options.Prefetch = None,
    eviction: options.Eviction = None,
    store: options.Store = None,
    config: options.ConfigFile = None,
) -> None:
    """Tokens per second of arms side by side, beside what this machine could reach.

    Every arm is a process of its own and must choose the same tokens, or no speed is shown and the
    exit code is 1. Real text is decoded token by token; the median and its interval are of timed
    runs in turn (A B C A B C), after one that is not timed. Warm: slots as the run before left
    them. Cold: slots empty, and the model's files dropped from the page cache, which direct reads
    (O_DIRECT) go past anyway; the resident arm keeps its experts. Roofline: 1 / max(active bytes /
    plain memory read, bytes the best LRU misses / plain disk read), all measured in the same run.

    Other systems (accelerate's disk offload, llama.cpp) run the same text, round elsewhere, and are
    shown with the share of tokens on which they agree.
    """
    module = _module("decode")
    if self_check:
        _self_check()
    given = {
        "device": device,
        "revision": revision,
        "format": format,
        "dense_format": dense_format,
        "dtype": dtype,
        "predictor": predictor,
        "prefetch": prefetch,
        "eviction": eviction,
        "num_threads": threads,
    }
    given = {name: value for name, value in given.items() if value is not None}
    engine, sources = options.engine_config(given, config)
    budgets = tuple(expert_memory or ())
    if not budgets:
        is_set = sources["expert_memory"] != DEFAULT
        budgets = (str(engine.expert_memory) if is_set else _DEFAULT_BUDGET,)
    shared = {name: getattr(engine, name) for name in sources if sources[name] != DEFAULT}
    wanted = module.DecodeOptions(
        model=model,
        budgets=budgets,
        arms=tuple(name.strip() for name in arms.split(",") if name.strip()),
        engine={name: str(v) if isinstance(v, Path) else v for name, v in shared.items()},
        store=None if store is None else str(store),
        prompts=prompts,
        num_passages=passages,
        num_tokens=tokens,
        prompt_tokens=prompt_tokens,
        follows_text=not greedy,
        repetitions=_REPETITIONS if repetitions is None else repetitions,
        time_limit_s=_TIME_LIMIT_S if repetitions is None else None,
        is_cold=cold,
        num_threads=engine.num_threads,
        seed=seed,
        memory_limit=memory_limit if memory_limit in (None, "auto") else parse_bytes(memory_limit),
        link_bytes_per_s=None if link is None else parse_bytes(link.removesuffix("/s")),
        llama=_llama(llama_python, gguf),
    )
    if plot is not None:
        _module("plot").require()
    with progress_bars() as progress:
        document = module.bench_decode(wanted, progress=progress)
    if plot is not None:
        _module("plot").plot_decode(document, plot)
    if profile is not None:
        _module("timeline").write_trace(document["timelines"], profile)
    if json:
        print_json(document)
        return
    _print_decode(document)


def make_geometry(
    out: Annotated[Path, typer.Option(help="folder to write the checkpoint into, new or empty")],
    model: options.Model = None,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 2048,
    expert: Annotated[int, typer.Option(help="inner size of a routed expert")] = 1408,
    dense: Annotated[
        int | None, typer.Option(help="inner size of the dense layers [7.77 times an expert's]")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="MoE layers: fewer or more than the model's change what it says [all]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random bytes that fill it up")] = 0,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Write the model at real expert sizes: its own tokens and routing, dense bytes to move."""
    module = _module("geometry")
    from ..models.loading import resolve_folder

    source = resolve_folder(model, revision=revision)
    with progress_bars() as progress:
        report = module.make_geometry(
            source,
            out,
            hidden=hidden,
            expert=expert,
            dense=dense,
            layers=layers,
            seed=seed,
            progress=lambda done, total: progress("writing the checkpoint", done, total),
        )
    if json:
        print_json(report.as_dict())
        return
    typer.echo(
        f"{report.out}: {report.num_moe_layers} MoE layers, {format_bytes(report.nbytes)} in "
        f"{report.seconds:.0f} s"
    )
    if not report.is_same_function:
        stderr_console().print("not all layers of the source: its text and this one's differ")


def make_gguf(
    model: options.Model = None,
    out: Annotated[Path, typer.Option(help="folder for TYPE.gguf")] = Path("gguf"),
    types: Annotated[
        str, typer.Option(help="with commas: bf16 and llama.cpp's names, such as q8_0, q4_0")
    ] = "q8_0",
    llama_python: _LlamaPython = None,
    threads: Annotated[int, typer.Option(help="threads that quantise")] = 2,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Write a DeepSeek-MoE checkpoint in bf16 as GGUF, so that llama.cpp runs the same weights."""
    from ..models.loading import resolve_folder

    if llama_python is None:
        raise UsageError(
            "make-gguf: name a Python that has gguf and llama-cpp-python "
            "(pip install gguf llama-cpp-python) by --llama-python"
        )
    order = {
        "folder": str(resolve_folder(model, revision=revision)),
        "out": str(out),
        "types": [name.strip() for name in types.split(",") if name.strip()],
        "threads": threads,
    }
    script = _module("llama_arm").SCRIPT_FOLDER / "llama_gguf.py"
    done = subprocess.run(
        [llama_python, script, dumps(order)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise OutriderError(f"make-gguf: {llama_python} {script.name} failed, see above")
    document = loads(done.stdout.splitlines()[-1])
    if json:
        print_json(document)
        return
    for file in document["files"]:
        typer.echo(f"{file}: {format_bytes(Path(file).stat().st_size)}")


def _llama(python: Path | None, gguf: Path | None) -> tuple[str, str] | None:
    if python is None and gguf is None:
        return None
    if python is None or gguf is None:
        raise UsageError("llama.cpp: both --llama-python and --gguf are needed")
    for path in (python, gguf):
        if not path.is_file():
            raise UsageError(f"llama.cpp: {path} is no file")
    return str(python), str(gguf)


def _self_check() -> None:
    checks = _module("self_check").self_check()
    console = stderr_console()
    for one in checks:
        console.print(f"{'ok ' if one.is_ok else 'BAD'}  {one.name}: {one.detail}", highlight=False)
    bad = [one.name for one in checks if not one.is_ok]
    if bad:
        raise OutriderError(f"self-check: {', '.join(bad)}; no speed is measured on top of that")


def _print_decode(document: dict[str, Any]) -> None:
    rows, environment = document["rows"], document["environment"]
    console = Console(highlight=False)
    for state in dict.fromkeys(row["cache"] for row in rows):
        table = Table(title=f"{state} caches", title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("arm", no_wrap=True)
        for heading in _DECODE_COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            if row["cache"] == state:
                table.add_row(f"{row['arm']} {row['budget']}", *_decode_cells(row))
        console.print(table)
    first = rows[0]
    counts = sorted({row["repetitions"] for row in rows})
    others = {row["arm"]: row["token_agreement"] for row in rows if row["token_agreement"] < 1.0}
    same = "All arms chose the same tokens" + "".join(
        f", but {arm} {100 * (1 - share):.1f} % others" for arm, share in others.items()
    )
    typer.echo(
        f"{first['model']}, experts in {first['format']}, {first['device_name']}, "
        f"threads {first['threads']}. {same}. Medians of "
        f"{' or '.join(map(str, counts))} runs with {100 * first['spread']['confidence']:.0f} % "
        f"intervals; ratio to {first['ratio']['to']}, run by run."
    )
    outside = {
        f"{row['arm']} {row['budget']}": row["outside_products_share"]
        for row in rows
        if row["outside_products_share"] is not None
    }
    if outside:
        shares = ", ".join(f"{arm} {100 * share:.1f} %" for arm, share in outside.items())
        typer.echo(f"Of the time without stalls, outside of products of matrices: {shares}.")
    typer.echo(
        f"Plain read {first['read_bytes_per_s'] / 1e9:.1f} GB/s, link "
        f"{first['link_bytes_per_s'] / 1e9:.2f} GB/s ({first['reads']} reads), "
        f"{first['active_bytes_per_token'] / 1e6:.1f} MB active a token. Load average "
        + " to ".join(f"{load:.1f}" for load in environment["load_average"])
        + f" on {environment['num_cpus']} processors."
    )


# Two lines each, so that the table fits 80 columns.
_DECODE_COLUMNS = (
    "tokens\n/s", "interval", "ratio", "roof-\nline", "hits", "late", "MB\nread", "stall\nms",
    "peak\nMB",
)  # fmt: skip


def _decode_cells(row: dict[str, Any]) -> list[str]:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.0f}%"

    return [
        f"{row['tokens_per_second']:.1f}",
        f"{row['spread']['low']:.1f}-{row['spread']['high']:.1f}",
        f"{row['ratio']['median']:.2f}",
        percent(row["roofline_share"]),
        percent(row["hit_rate"]),
        percent(row["late_rate"]),
        f"{row['bytes_per_token'] / 1e6:.2f}",
        f"{1000 * row['stall_s_per_token']:.1f}",
        f"{row['rss_peak_bytes'] / 1e6:.0f}",
    ]
