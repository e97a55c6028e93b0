"""The one console entry point. Names commands by string and imports them when they are called."""

import atexit
import contextlib
import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..collect.errors import CollectError
from ..predictors.errors import PredictorError
from .errors import OutriderError

# name -> (module below this package, one-line help). A module offers a typer app named `app`.
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("commands.generate", "Generate text within an expert-memory budget."),
    "pack": ("commands.pack", "Pack a model's experts into a store of another format."),
    "verify": ("commands.verify", "Check every checksum of an expert store."),
    "inspect": ("commands.inspect", "Say what a store, trace, predictor or model is."),
    "env": ("commands.env", "Versions, devices, memory, measured speeds, advice."),
    "collect": ("commands.collect", "Record routing traces of a model on text."),
    "analyze": ("commands.analyze", "Expert analysis of traces: JSON, figures, one HTML page."),
    "compare": ("commands.compare", "Traces of several models side by side."),
    "serve": ("commands.serve", "Serve generation over ZeroMQ: many clients, one engine."),
    "ask": ("commands.ask", "Send a prompt to a server; the answer streams to stdout."),
    "gateway": ("commands.gateway", "OpenAI-compatible HTTP in front of a server."),
    "train": ("commands.train", "Train a predictor on traces."),
    "evaluate": ("commands.evaluate", "Judge predictors on held-out text."),
    "bench": ("commands.bench", "Measure hit rates, speeds and bytes."),
}
# Top-level packages that only an extra installs.
_EXTRAS = {
    "jinja2": "analysis",
    "matplotlib": "analysis",
    "optuna": "sweep",
    "prometheus_client": "serve",
    "ray": "ray",
    "sklearn": "analysis",
    "starlette": "serve",
    "uvicorn": "serve",
}
INTERRUPTED = 130
OUT_OF_MEMORY = 4


class LazyGroup(TyperGroup):
    """A group whose commands are imported on use, so that --help needs none of them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What stands for a command in the list of commands: its name and line of help."""
        return _summary(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, imported now."""
        if args[0] not in COMMANDS:
            return super().resolve_command(ctx, args)
        module = importlib.import_module(f".{COMMANDS[args[0]][0]}", __package__)
        return args[0], typer.main.get_command(module.app), args[1:]

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what a user can meet is one line on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (OutriderError, CollectError, PredictorError) as error:
            typer.echo(f"outrider: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            typer.echo(
                f"outrider: this needs {error.name}: pip install 'outrider[{extra}]'", err=True
            )
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("\noutrider: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except MemoryError as error:
            typer.echo("outrider: out of memory; give a smaller --expert-memory", err=True)
            raise typer.Exit(OUT_OF_MEMORY) from error
        except BrokenPipeError as error:
            # The reader of our output has gone; flushing at exit would raise once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error


def _summary(name: str) -> Any:
    def command() -> None:
        """Stands in for a command where only its line of help is shown."""

    stand_in = typer.Typer(add_completion=False)
    stand_in.command(name, help=COMMANDS[name][1])(command)
    return typer.main.get_command(stand_in)


app = typer.Typer(
    cls=LazyGroup,
    help="outrider: run Mixture-of-Experts models whose experts do not fit into fast memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"outrider {version('outrider')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """outrider: run Mixture-of-Experts models whose experts do not fit into fast memory."""


def main() -> None:
    """The console script `outrider`. Ends the process."""
    try:
        app()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    _leave(code if isinstance(code, int) else int(code is not None))


def _leave(code: int) -> None:
    """End the process with `code`, once exit handlers have run and output is written.

    Taking a million imported objects apart one by one, as the interpreter would, is a second of
    waiting for every command that imported torch.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()
    os._exit(code)
