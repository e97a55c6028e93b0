"""`outrider generate`: one prompt in, streamed text out, a summary of speed and traffic."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .display import print_json, print_rows, progress_bars, stderr_console, summary
from .startup import heavy_imports

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    model: options.Model = None,
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; left out, read from standard input")
    ] = None,
    chat: Annotated[bool, typer.Option(help="put the prompt into the chat template")] = False,
    json: options.Json = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = None,
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
    profile: options.Profile = None,
    store: options.Store = None,
    config: options.ConfigFile = None,
    print_config: options.PrintConfig = False,
) -> None:
    """Generate text within an expert-memory budget.

    Tokens go to stdout as they come, a summary of speed and expert traffic to stderr.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    params, sampling_sources = options.sampling_params(given, config)
    engine_config, engine_sources = options.engine_config(given, config)
    if print_config:
        rows = options.describe(engine_config, params, engine_sources | sampling_sources)
        if json:
            print_json({"rows": rows})
        else:
            columns = {"option": "option", "value": "value", "where": "where from"}
            print_rows(rows, columns=columns)
        return
    text = options.prompt_text(prompt)
    with heavy_imports():
        from ..engine import Engine
    from ..request import ChatMessage

    with progress_bars() as progress:
        engine = Engine.from_config(engine_config, model=model, store=store, progress=progress)
    message: Any = [ChatMessage(role="user", content=text)] if chat else text
    with engine, _profiled(engine_config.profile):
        stream = engine.stream(message, params)
        pieces = []
        while True:
            try:
                chunk = next(stream)
            except StopIteration as end:
                result = end.value
                break
            pieces.append(chunk.text)
            if not json:
                typer.echo(chunk.text, nl=False)
        if not json:
            typer.echo()
            stderr_console().print(
                summary(result.stats, num_tokens=len(result.token_ids)), soft_wrap=True
            )
            return
        print_json(
            {
                "model": model or "nano",
                "format": engine.tier.source.format,
                "device": str(engine.loaded.device),
                "predictor": engine.tier.predictor_name,
                "exact": engine.config.is_exact,
                "prompt_token_ids": list(result.prompt_token_ids),
                "token_ids": list(result.token_ids),
                "text": result.text,
                "finish_reason": result.finish_reason,
                "usage": result.usage,
                **result.stats.as_dict(),
            }
        )


@contextlib.contextmanager
def _profiled(folder: str | Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    from torch.profiler import profile

    with profile() as trace:
        yield
    Path(folder).mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(Path(folder) / "trace.json"))
