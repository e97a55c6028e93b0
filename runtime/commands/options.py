"""The options that commands share, and how their four layers become configuration values."""

import os
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


def _engine(kind: Any, help_text: str, **options: Any) -> Any:
    return Annotated[
        kind, typer.Option(help=help_text, rich_help_panel=_ENGINE, show_default=False, **options)
    ]


def _sampling(kind: Any, help_text: str) -> Any:
    return Annotated[
        kind, typer.Option(help=help_text, rich_help_panel=_SAMPLING, show_default=False)
    ]


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
Revision: TypeAlias = _engine(str | None, "branch, tag or commit of a hub model")
Device: TypeAlias = _engine(str | None, "cpu, cuda or cuda:N [auto]")
ExpertMemory: TypeAlias = _engine(
    str | None, "8GiB, 512MiB, 25% (of all routed experts), all or auto [auto]"
)
HostMemory: TypeAlias = _engine(str | None, "host cache size, on a machine with a GPU [auto]")
Format: TypeAlias = _engine(
    str | None, "of the experts: fp32, bf16, fp16, int8, int4, nf4 [as the checkpoint]"
)
DenseFormat: TypeAlias = _engine(str | None, "of the dense weights: same, int8, int4 [same]")
Dtype: TypeAlias = _engine(
    str | None, "of the computation: fp32, bf16, fp16 [as the checkpoint]"
)
Predictor: TypeAlias = _engine(
    str | None, "none, random, frequent, lookahead, or a folder made by outrider train [auto]"
)
Prefetch: TypeAlias = _engine(str | None, "on, off, or auto: as far as it pays [auto]")
Eviction: TypeAlias = _engine(str | None, "lru, lfu, layer-lru, layer-lfu, static, ...")
OnMiss: TypeAlias = _engine(str | None, "fetch, or on a GPU machine host or auto [fetch]")
VerifyOnLoad: TypeAlias = _engine(
    bool | None, "check each expert's checksum when it is read (packed stores)"
)
NumThreads: TypeAlias = _engine(int | None, "CPU threads for arithmetic")
Profile: TypeAlias = _engine(Path | None, "folder for a torch profiler trace of the run")

MaxTokens: TypeAlias = _sampling(int | None, "tokens to generate at most [128]")
Temperature: TypeAlias = _sampling(float | None, "0 is greedy [1.0]")
TopP: TypeAlias = _sampling(float | None, "nucleus probability [1.0]")
TopK: TypeAlias = _sampling(int | None, "most likely tokens to choose from, 0 is all [0]")
MinP: TypeAlias = _sampling(float | None, "least probability relative to the likeliest [0.0]")
Seed: TypeAlias = _sampling(int | None, "makes sampling repeatable")
Stop: TypeAlias = _sampling(list[str] | None, "text that ends the output; may be repeated")
IgnoreEos: TypeAlias = _sampling(bool | None, "go on after the model's end-of-text token")


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
