"""Which layer gave an option its value: command line, environment, configuration file, default.

Knows names and where values stand, never what an option means: values from the environment and from
a file are handed on as the strings that were written.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import FieldError, UsageError

ENVIRONMENT_PREFIX = "OUTRIDER_"
MAX_FILE_BYTES = 64 * 1024
# Below this likeness a variable is taken for another part's own, not for a misspelt option.
_MISSPELT = 0.8


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one value came from; `where` is the flag, the variable, `file.yaml:3`, or `default`."""

    source: Literal["command line", "environment", "file", "default"]
    where: str


DEFAULT = Provenance("default", "default")


def gather(
    names: Collection[str],
    cli: Mapping[str, object],
    env: Mapping[str, str],
    file: Path | None,
    *,
    other_names: Collection[str] = (),
) -> dict[str, tuple[object, Provenance]]:
    """The highest layer's value of each option in `names` that was given at all.

    Command line > `OUTRIDER_*` environment > file. None on the command line, an empty variable and
    an empty or null entry of the file mean "not given". A file's list stays a list of strings.
    `other_names` are accepted and passed over: another part of the same command reads them.

    Raises `UsageError` for an unreadable file and `FieldError` for a name nobody accepts.
    """
    accepted = [*names, *(name for name in other_names if name not in names)]
    for name in cli:
        if name not in accepted:
            raise _unknown(name, accepted, where="given as an option")
    _check_environment(env, accepted)

    found: dict[str, tuple[object, Provenance]] = {}
    for name, (value, line) in _read_file(file).items():
        if name not in accepted:
            raise _unknown(name, accepted, where=f"{file}:{line}")
        if name in names and value is not None:
            found[name] = (value, Provenance("file", f"{file}:{line}"))
    for name in names:
        variable = environment_name(name)
        if env.get(variable):
            found[name] = (env[variable], Provenance("environment", variable))
        if cli.get(name) is not None:
            found[name] = (cli[name], Provenance("command line", option_name(name)))
    return found


def option_name(name: str) -> str:
    """The command line's spelling: `expert_memory` is `--expert-memory`."""
    return "--" + name.replace("_", "-")


def environment_name(name: str) -> str:
    """The environment's spelling: `expert_memory` is `OUTRIDER_EXPERT_MEMORY`."""
    return ENVIRONMENT_PREFIX + name.upper()


def _check_environment(env: Mapping[str, str], accepted: Collection[str]) -> None:
    known = [name.upper() for name in accepted]
    for variable in env:
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or name in known:
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT):
            raise UsageError(
                f"environment variable {variable} is not known, did you mean "
                f"{ENVIRONMENT_PREFIX}{close[0]}"
            )


def _unknown(name: object, accepted: Collection[str], *, where: str) -> FieldError:
    close = difflib.get_close_matches(str(name), accepted, n=1)
    hint = f", did you mean {close[0]}" if close else ""
    return FieldError(
        str(name), f"unknown option {name!r} ({where}){hint}; accepted: {', '.join(accepted)}"
    )


def _read_file(file: Path | None) -> dict[str, tuple[object, int]]:
    """Option name -> (value as written, line), from one flat YAML mapping."""
    if file is None:
        return {}
    import yaml

    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise UsageError(
                f"configuration file {file} is larger than {MAX_FILE_BYTES} bytes, the most a file "
                "of options can need"
            )
        # Composed, not constructed: `on` stays a word instead of becoming a truth value, a revision
        # of digits stays text, and no tag can make an object.
        root = yaml.compose(raw.decode(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UsageError(f"configuration file {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"configuration file {file} is not YAML: {reason}") from None

    options: dict[str, tuple[object, int]] = {}
    if root is None:
        return options
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"configuration file {file} must hold `option: value` lines")
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{file}:{line}: an option's name must be a word")
        name = key.value.replace("-", "_")
        if name in options:
            raise FieldError(
                name, f"{file}:{line}: {key.value} is given twice, first on line {options[name][1]}"
            )
        options[name] = (_written(value, f"{file}:{line}"), line)
    return options


def _written(node: object, where: str) -> object:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        is_null = node.style is None and node.value.lower() in ("", "~", "null")
        return None if is_null else node.value
    if isinstance(node, yaml.SequenceNode):
        items = [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
        if len(items) == len(node.value):
            return items
    raise UsageError(f"{where}: an option's value must be a word, a number or a list of them")
