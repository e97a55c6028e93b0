"""The options that commands share, and how their four layers become configuration values."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import typer

from ..config import OPTION_NAMES, EngineConfig, resolve_config
from ..errors import UsageError
from ..provenance import DEFAULT, Provenance, gather
from ..request import SamplingParams

_ENGINE = "Engine options"
_SAMPLING = "Sampling options"


def _engine(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel=_ENGINE, show_default=False)


def _sampling(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel=_SAMPLING, show_default=False)


Model: TypeAlias = Annotated[
    str | None, typer.Argument(help="local folder or hub id; left out, the built-in nano")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="YAML file of options, below OUTRIDER_* variables")
]
PrintConfig: TypeAlias = Annotated[
    bool, typer.Option("--print-config", help="show each value and where it came from, and stop")
]
Store: TypeAlias = Annotated[
    Path | None, typer.Option(help="expert store made by outrider pack, instead of the cached one")
]
Revision: TypeAlias = Annotated[str | None, _engine("branch, tag or commit of a hub model")]
Device: TypeAlias = Annotated[str | None, _engine("cpu, cuda or cuda:N [auto]")]
ExpertMemory: TypeAlias = Annotated[
    str | None, _engine("8GiB, 512MiB, 25% (of all routed experts), all or auto [auto]")
]
HostMemory: TypeAlias = Annotated[
    str | None, _engine("host cache size, on a machine with a GPU [auto]")
]
Format: TypeAlias = Annotated[
    str | None, _engine("of the experts: fp32, bf16, fp16, int8, int4, nf4 [as the checkpoint]")
]
DenseFormat: TypeAlias = Annotated[
    str | None, _engine("of the dense weights: same, int8, int4 [same]")
]
Dtype: TypeAlias = Annotated[
    str | None, _engine("of the computation: fp32, bf16, fp16 [as the checkpoint]")
]
Predictor: TypeAlias = Annotated[
    str | None,
    _engine(
        "none, random, frequent, lookahead, or a folder made by outrider train [auto: the "
        "model's shipped one, else lookahead]"
    ),
]
Prefetch: TypeAlias = Annotated[str | None, _engine("on, off, or auto: as far as it pays [auto]")]
Eviction: TypeAlias = Annotated[
    str | None, _engine("auto, forecast, layer-lfu, layer-lru, layer-ucp, lfu, lru, static")
]
OnMiss: TypeAlias = Annotated[
    str | None, _engine("fetch, or on a GPU machine host or auto [fetch]")
]
VerifyOnLoad: TypeAlias = Annotated[
    bool | None, _engine("check each expert's checksum when it is read (packed stores)")
]
NumThreads: TypeAlias = Annotated[int | None, _engine("CPU threads for arithmetic")]
Profile: TypeAlias = Annotated[Path | None, _engine("folder for a torch profiler trace of the run")]

MaxTokens: TypeAlias = Annotated[int | None, _sampling("tokens to generate at most [128]")]
Temperature: TypeAlias = Annotated[float | None, _sampling("0 is greedy [1.0]")]
TopP: TypeAlias = Annotated[float | None, _sampling("nucleus probability [1.0]")]
TopK: TypeAlias = Annotated[
    int | None, _sampling("most likely tokens to choose from, 0 is all [0]")
]
MinP: TypeAlias = Annotated[
    float | None, _sampling("least probability relative to the likeliest [0.0]")
]
Seed: TypeAlias = Annotated[int | None, _sampling("makes sampling repeatable")]
Stop: TypeAlias = Annotated[
    list[str] | None, _sampling("text that ends the output; may be repeated")
]
IgnoreEos: TypeAlias = Annotated[
    bool | None, _sampling("go on after the model's end-of-text token")
]


def engine_config(
    given: Mapping[str, object], file: Path | None
) -> tuple[EngineConfig, dict[str, Provenance]]:
    """The engine's configuration from `given` command-line values and the lower layers."""
    cli = {name: value for name, value in given.items() if name in OPTION_NAMES}
    return resolve_config(cli, os.environ, file, other_names=SamplingParams.__struct_fields__)


def sampling_params(
    given: Mapping[str, object], file: Path | None
) -> tuple[SamplingParams, dict[str, Provenance]]:
    """Sampling values likewise. Raises UsageError naming the field and its range."""
    names = SamplingParams.__struct_fields__
    cli = {name: value or None for name, value in given.items() if name == "stop"}
    cli |= {name: value for name, value in given.items() if name in names and name != "stop"}
    found = gather(names, cli, os.environ, file, other_names=OPTION_NAMES)
    values = {name: value for name, (value, _) in found.items()}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    try:
        params = msgspec.convert(values, SamplingParams, strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise UsageError(str(error)) from error
    return params, {name: found[name][1] if name in found else DEFAULT for name in names}


def prompt_text(given: str | None) -> str:
    """--prompt, or standard input. Raises UsageError if there is no text; blocks on a pipe."""
    if given is not None:
        text = given
    elif sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT, or pipe text to standard input")
    else:
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"prompt on standard input is not UTF-8: {error}") from error
    if not text:
        raise UsageError("the prompt is empty; give at least one character")
    return text


def describe(
    config: EngineConfig,
    params: SamplingParams | None,
    sources: Mapping[str, Provenance],
) -> list[dict[str, object]]:
    """Rows of --print-config: option, value, source, where."""
    values: dict[str, object] = {name: getattr(config, name) for name in OPTION_NAMES}
    if params is not None:
        values |= msgspec.structs.asdict(params)
    return [
        {
            "option": name,
            "value": str(value) if isinstance(value, Path) else value,
            "source": sources[name].source,
            "where": sources[name].where,
        }
        for name, value in values.items()
    ]
