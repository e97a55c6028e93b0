"""`outrider bench serve`: a server of its own under 1 to 16 clients, beside the engine by itself.

Levels take turns (1 2 4 8 16, 1 2 4 8 16), and the engine alone answers the same prompts in
between, so that what else the machine does falls on all alike. Knows processes and turns; `load`
is the clients, `latencies` the figures.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.errors import OutriderError, UsageError
from .environment import environment
from .latencies import experts, figures, tpot_s
from .load import Load, Prompt, Taken, put_load
from .spread import paired_ratio, spread
from .worker import Worker
from .workload import BUILT_IN, read_texts

Progress = Callable[[str, int, int], None]
_COMMAND = "from outrider.runtime.cli import main; main()"
_CHARACTERS_PER_TOKEN = 16
# Requests of a repetition that the engine alone answers as well.
_NUM_PAIRS = 8


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to measure. `engine` are EngineConfig fields of the server and the engine alone.

    Every client sends `requests` requests one after the other; a level is run `repetitions` times.
    """

    model: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    store: str | None = None
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    requests: int = 4
    prompts: str = BUILT_IN
    prompt_tokens: int = 16
    num_tokens: int = 32
    num_idle: int = 64
    repetitions: int = 3
    max_running: int = 16


class ServedDifferently(OutriderError):
    """The server chose other tokens than the engine alone, so its speed says nothing."""


def bench_serve(options: ServeOptions, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and return the `bench serve` document of INTERFACES section 1. Blocks for minutes.

    Raises UsageError for options that cannot be, ServedDifferently if one client's tokens are not
    those of the engine alone.
    """
    _check(options)
    tell = progress or (lambda what, done, total: None)
    around = environment()
    arguments = {"model": options.model, "options": dict(options.engine), "store": options.store}
    num_threads = options.engine.get("num_threads")
    with Worker("alone", arguments, num_threads=num_threads) as alone, _server(options) as address:
        texts = read_texts(options.prompts, max(options.clients) * options.requests)
        longest = options.prompt_tokens * _CHARACTERS_PER_TOKEN
        encoded = alone.call("encode", [text[:longest] for _, text in texts], kind=list[list[int]])
        prompts = [
            Prompt(name, ids[: options.prompt_tokens], options.num_tokens)
            for (name, _), ids in zip(texts, encoded, strict=True)
        ]
        run = _Run(options, address, alone, prompts)
        # Once before anything counts: caches fill, pages are touched.
        run.serve(max(options.clients))
        run.alone_and_served()
        steps = options.repetitions * (len(options.clients) + 2)
        done = 0
        for _ in range(options.repetitions):
            for what in (*options.clients, "alone", "idle"):
                tell("serving", done, steps)
                run.turn(what)
                done += 1
        tell("serving", steps, steps)
    return run.document(around.ended().as_dict(), around.stamp())


class _Run:
    def __init__(
        self, options: ServeOptions, address: str, alone: Worker, prompts: list[Prompt]
    ) -> None:
        self._options = options
        self._address = address
        self._alone = alone
        self._prompts = prompts
        self._loads: dict[int, list[Load]] = {number: [] for number in options.clients}
        self._pairs: list[tuple[Taken, Taken]] = []
        self._idle: list[tuple[Taken, Taken]] = []
        self._expected: dict[str, list[int]] = {}

    def serve(self, num_clients: int, *, num_requests: int = 0, num_idle: int = 0) -> Load:
        """One level, once; each client has prompts of its own as far as there are enough."""
        each = num_requests or self._options.requests
        shares = [
            [self._prompts[(client * each + place) % len(self._prompts)] for place in range(each)]
            for client in range(num_clients)
        ]
        return asyncio.run(put_load(self._address, shares, num_idle=num_idle))

    def alone_and_served(self) -> list[tuple[Taken, Taken]]:
        """The same prompts, one by the engine alone, one through the server, in turns."""
        pairs = []
        for prompt in self._prompts[:_NUM_PAIRS]:
            reply = self._alone.call(
                "measure", prompt.token_ids, prompt.num_tokens, kind=dict[str, Any]
            )
            by_itself = Taken(prompt, reply["times_s"], reply["token_ids"], reply["times_s"][-1])
            served = asyncio.run(put_load(self._address, [[prompt]])).taken[0]
            if served.error is not None:
                raise OutriderError(f"the server failed: {served.error}")
            if served.token_ids != by_itself.token_ids:
                raise ServedDifferently(f"{prompt.name}: the served tokens are not the engine's")
            self._expected[prompt.name] = by_itself.token_ids
            pairs.append((by_itself, served))
        return pairs

    def turn(self, what: int | str) -> None:
        """One part of a repetition."""
        if what == "alone":
            self._pairs += self.alone_and_served()
        elif what == "idle":
            quiet = self.serve(1, num_requests=4)
            crowded = self.serve(1, num_requests=4, num_idle=self._options.num_idle)
            self._idle += zip(quiet.taken, crowded.taken, strict=True)
        else:
            self._loads[int(what)].append(self.serve(int(what)))

    def document(self, surroundings: dict[str, Any], stamp: dict[str, Any]) -> dict[str, Any]:
        """Rows and comparisons."""
        options = self._options
        model = next(iter(self._loads.values()))[0].before
        first = [_throughput(load) for load in self._loads[options.clients[0]]]
        rows = []
        for number, loads in self._loads.items():
            speeds = [_throughput(load) for load in loads]
            rows.append(
                {
                    "max_concurrency": number,
                    **figures(loads),
                    "spread": spread(speeds).as_dict(),
                    "ratio": paired_ratio(speeds, first).as_dict() | {"to": options.clients[0]},
                    "same_tokens_as_alone": self._same(loads),
                    "experts": experts(loads),
                    "repetitions": options.repetitions,
                    **stamp,
                }
            )
        return {
            "bench": "serve",
            "environment": surroundings,
            "workload": {
                "model": options.model or "nano",
                "engine": dict(options.engine),
                "prompts": options.prompts,
                "prompt_tokens": options.prompt_tokens,
                "output_tokens": options.num_tokens,
                "requests_per_client": options.requests,
                "max_running": options.max_running,
                "expert_cache_bytes": model.expert_cache_bytes,
            },
            "rows": rows,
            "server": _compare(self._pairs) | {"compared_with": "the engine alone"},
            "idle_clients": _compare(self._idle) | {"clients": options.num_idle},
        }

    def _same(self, loads: list[Load]) -> float | None:
        known = [
            one.token_ids == self._expected[one.prompt.name]
            for load in loads
            for one in load.taken
            if one.error is None and one.prompt.name in self._expected
        ]
        return sum(known) / len(known) if known else None


def _throughput(load: Load) -> float:
    return sum(len(one.token_ids) for one in load.taken) / load.duration_s


def _compare(pairs: list[tuple[Taken, Taken]]) -> dict[str, Any]:
    """The second of each pair against the first: tpot as a ratio, ttft as what was added."""
    firsts = [tpot_s(first) for first, _ in pairs]
    seconds = [tpot_s(second) for _, second in pairs]
    added = [1000 * (second.times_s[0] - first.times_s[0]) for first, second in pairs]
    return {
        "tpot_ratio": paired_ratio(seconds, firsts).as_dict(),
        "ttft_added_ms": spread(added).as_dict(),
    }


@contextmanager
def _server(options: ServeOptions) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="outrider-") as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *_arguments(options, folder)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(os.environ),
            )
        assert process.stdout is not None
        try:
            address = process.stdout.readline().decode().strip()
            if not address:
                process.wait()
                lines = log_file.read_text(errors="replace").strip().splitlines()
                raise OutriderError(f"the server did not start: {lines[-1] if lines else ''}")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _arguments(options: ServeOptions, folder: str) -> list[str]:
    arguments = ["serve", "--bind", f"ipc://{folder}/s", "--log-level", "warning"]
    arguments += ["--max-running", str(options.max_running)]
    for name, value in options.engine.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    if options.store is not None:
        arguments += ["--store", options.store]
    return arguments + ([] if options.model is None else [options.model])


def _check(options: ServeOptions) -> None:
    for name, given, least in (
        ("requests", options.requests, 1),
        ("tokens", options.num_tokens, 2),
        ("prompt-tokens", options.prompt_tokens, 1),
        ("repetitions", options.repetitions, 1),
        ("idle", options.num_idle, 0),
    ):
        if given < least:
            raise UsageError(f"{name}: {given}; at least {least} is needed")
    if not options.clients or min(options.clients) < 1:
        raise UsageError("clients: whole numbers above 0, with commas, such as 1,2,4,8,16")
