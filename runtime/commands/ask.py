"""`outrider ask`: a prompt to a running server, its answer on stdout as it comes."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..request import ChatMessage, GenerationRequest
from . import options
from .display import print_json, stderr_console

app = typer.Typer(add_completion=False)


@app.command()
def ask(
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; left out, read from standard input")
    ] = None,
    connect: Annotated[
        str | None, typer.Option(help="the server: ipc:///PATH or tcp://ADDRESS:PORT [your own]")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="folder of this client's keys, if the server wants any")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="seconds of silence after which the server counts as gone", min=1)
    ] = 30.0,
    deadline_ms: Annotated[
        int | None, typer.Option(help="milliseconds after which the answer is of no use")
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
    config: options.ConfigFile = None,
) -> None:
    """Send a prompt to `outrider serve` and stream the answer to stdout.

    Ctrl-C cancels the request. Exit: 0 ok, 1 failure, 2 refused.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    params, _ = options.sampling_params(given, config)
    text = options.prompt_text(prompt)
    request = GenerationRequest.from_params(
        params,
        prompt=None if chat else text,
        messages=[ChatMessage(role="user", content=text)] if chat else None,
        stream=True,
        deadline_ms=deadline_ms,
    )
    from ..serving.client import Client
    from ..serving.messages import Chunk

    pieces: list[str] = []
    token_ids: list[int] = []
    with (
        Client(connect, timeout_s=timeout, keys=keys, name="outrider ask") as client,
        closing(client.generate(request)) as stream,
    ):
        done: Any = None
        for item in stream:
            if not isinstance(item, Chunk):
                done = item
                continue
            pieces.append(item.text)
            token_ids.extend(item.token_ids)
            if not json:
                typer.echo(item.text, nl=False)
    usage = {
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
    }
    if json:
        print_json(
            {
                "token_ids": token_ids,
                "text": "".join(pieces),
                "finish_reason": done.finish_reason,
                "usage": usage,
                "timings": done.timings,
                "experts": done.experts,
            }
        )
        return
    typer.echo()
    speed = done.timings.get("decode_tokens_per_s")
    stderr_console().print(
        f"{usage['completion_tokens']} tokens"
        + (f", {speed:.1f} tokens/s decoding" if speed else "")
        + f"; ended by {done.finish_reason}",
        soft_wrap=True,
    )
