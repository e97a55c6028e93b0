"""A server process over an engine that is not one: it imports neither torch nor transformers.

Tokens are bytes, and what is generated follows from the prompt alone (`answer`), so that a test can
tell whether one client's trouble changed another one's tokens. Some prompts are orders: see
`DoubleBackend`. Run as a program it takes its settings as one JSON document, and says its address.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from outrider.runtime.detokenizer import Detokenizer
from outrider.runtime.errors import FieldError, TransferError
from outrider.runtime.scheduler import BatchLimits, Scheduler
from outrider.runtime.serving import endpoint, keys, log
from outrider.runtime.serving.backend import ExpertTotals
from outrider.runtime.serving.health import Patience
from outrider.runtime.serving.messages import Model
from outrider.runtime.serving.server import Server, ServerOptions
from outrider.runtime.serving.transport import LinkOptions

CONTEXT_TOKENS = 8192
VOCAB_SIZE = 256
NUM_LAYERS, NUM_EXPERTS = 2, 4
ECHO = "echo:"
SLOW_STEP_S = 0.25
# Both sides of a connection may be stopped for minutes by whoever measures something.
PATIENT = LinkOptions(heartbeat_s=60, heartbeat_timeout_s=600)


def answer(prompt: str | bytes, num_tokens: int) -> bytes:
    """The tokens that the double generates for a prompt, whatever else it does."""
    data = prompt.encode() if isinstance(prompt, str) else prompt
    if data.startswith(ECHO.encode()):
        text = data[len(ECHO) :]
        return (text * (num_tokens // len(text) + 1))[:num_tokens]
    start = sum((place + 1) * value for place, value in enumerate(data))
    return bytes(97 + (start + 7 * index * index) % 26 for index in range(num_tokens))


class ByteTokenizer:
    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


@dataclass(eq=False)
class DoubleStream:
    prompt_token_ids: list[int]
    request: Any
    answer: bytes
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    num_computed: int = 0
    num_cached_tokens: int = 0

    @property
    def num_pending(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids) - self.num_computed

    @property
    def is_prefill(self) -> bool:
        return self.num_computed < len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def stats(self) -> Any:
        document = {"timings": {"ttft_s": 0.0}, "experts": {"total": 8, "decode": {"lookups": 1}}}
        return SimpleNamespace(as_dict=lambda: document)


class DoubleBackend:
    """Prompts that are orders: `die` ends the engine, `hang` stops it, `fail` fails its pass,
    `trip` is not even begun.

    A pass with a prompt that begins with `slow` takes a quarter of a second.

    `totals().cache_bytes` is the KV memory promised, in tokens, so that a leak of it shows.
    """

    def __init__(self, *, step_s: float, max_running: int, max_kv_tokens: int) -> None:
        self.max_running = max_running
        self.num_failures = 0
        self.model = Model(
            name="double",
            fingerprint="double",
            vocab_size=VOCAB_SIZE,
            context_tokens=CONTEXT_TOKENS,
            num_moe_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            top_k=1,
            num_slots=4,
            format="fp32",
            predictor="none",
            has_chat_template=False,
        )
        self._step_s = step_s
        self._max_kv_tokens = max_kv_tokens
        self._num_steps = 0
        self._scheduler: Scheduler[DoubleStream] = Scheduler(
            BatchLimits(
                max_num_seqs=max_running,
                max_num_batched_tokens=CONTEXT_TOKENS,
                max_kv_tokens=max_kv_tokens,
            )
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running + self._scheduler.num_paused

    def encode(self, request: Any) -> list[int]:
        if request.prompt_token_ids is not None:
            token_ids = list(request.prompt_token_ids)
        else:
            token_ids = list(request.prompt.encode())
        request.validate_against(VOCAB_SIZE, CONTEXT_TOKENS, prompt_token_ids=token_ids)
        return token_ids

    def submit(self, request: Any, token_ids: list[int], *, owner: str) -> DoubleStream:
        stream = DoubleStream(
            token_ids,
            request,
            answer(bytes(token_ids), request.max_tokens),
            Detokenizer(ByteTokenizer(), stop=request.stop),
        )
        if bytes(token_ids) == b"trip":
            raise RuntimeError("told to trip")
        num_tokens = len(token_ids) + request.max_tokens
        if num_tokens > self._max_kv_tokens:
            raise FieldError("max_tokens", f"there are {self._max_kv_tokens} tokens in all")
        self._scheduler.add(stream, owner=owner, num_kv_tokens=num_tokens)
        return stream

    def step(self) -> dict[DoubleStream, str]:
        batch = self._scheduler.schedule()
        if not batch.spans:
            return {}
        prompts = [bytes(span.sequence.prompt_token_ids) for span in batch.spans]
        is_slow = any(prompt.startswith(b"slow") for prompt in prompts)
        time.sleep(SLOW_STEP_S if is_slow else self._step_s)
        self._num_steps += 1
        if b"die" in prompts:
            raise RuntimeError("told to die")
        while b"hang" in prompts:
            time.sleep(0.1)
        if b"fail" in prompts:
            self.num_failures += 1
            for span in batch.spans:
                span.sequence.error = TransferError("told to fail")
                span.sequence.finish_reason = "error"
            return {span.sequence: "" for span in batch.spans}
        self.num_failures = 0
        pieces = {}
        for span in batch.spans:
            stream = span.sequence
            stream.num_computed += span.num_tokens
            if span.is_last:
                pieces[stream] = self._sample(stream)
        return pieces

    def _sample(self, stream: DoubleStream) -> str:
        token_id = stream.answer[len(stream.token_ids)]
        stream.token_ids.append(token_id)
        top = tuple(
            (token_id + place, -1.0 - place) for place in range(stream.request.logprobs or 0)
        )
        stream.tokens.append(SimpleNamespace(token_id=token_id, logprob=-1.0, top_logprobs=top))
        text = stream.detokenizer.push(token_id)
        if stream.detokenizer.stopped:
            stream.finish_reason = "stop"
        elif len(stream.token_ids) == stream.request.max_tokens:
            text += stream.detokenizer.finish()
            stream.finish_reason = "length"
        return text

    def cancel(self, stream: DoubleStream) -> None:
        stream.finish_reason = stream.finish_reason or "cancelled"
        self._scheduler.forget_finished()

    def pause(self, stream: DoubleStream) -> None:
        self._scheduler.pause(stream)

    def resume(self, stream: DoubleStream) -> None:
        self._scheduler.resume(stream)

    def token_text(self, token_id: int) -> str:
        return bytes([token_id % VOCAB_SIZE]).decode(errors="replace")

    def totals(self) -> ExpertTotals:
        self._scheduler.forget_finished()
        return ExpertTotals(
            lookups={"hit": self._num_steps, "late": 0, "miss": 0},
            prefetch={"used": 0, "wasted": 0, "cancelled": 0},
            transfer_bytes={"on_demand": 0, "prefetch": 0},
            stall_s=0.0,
            cache_bytes=self._scheduler.num_kv_tokens,
            is_degraded=False,
            residency=bytes(NUM_LAYERS * NUM_EXPERTS),
        )

    def progress(self) -> object:
        return self._num_steps

    def close(self) -> None:
        pass


@dataclass
class ServerProcess:
    """A running server: where it is, and everything it has logged once it has ended."""

    process: subprocess.Popen[str]
    address: str
    log_file: Path

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def events(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.logged() if line["event"] == what]

    def wait(self) -> int:
        # Far longer than it takes: the whole machine may be stopped meanwhile.
        return self.process.wait(timeout=280)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=280)


def start(folder: Path, *, arguments: list[str] | None = None, **settings: Any) -> ServerProcess:
    """Start a server; `arguments` are a command line to run instead of the double."""
    settings.setdefault("address", f"ipc://{folder}/s")
    log_file = folder / f"log-{len(list(folder.glob('log-*')))}"
    command = arguments or [sys.executable, __file__, json.dumps(settings)]
    with log_file.open("w") as log_to:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log_to,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    process.stdout.close()
    server = ServerProcess(process, address, log_file)
    if not address:
        process.wait(timeout=280)
    return server


def main(settings: dict[str, Any]) -> int:
    """Serve until stopped."""
    if num_files := settings.get("num_files"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    if settings.get("jumping_clock"):
        _make_the_time_of_day_jump()
    log.write_to_stderr(10)
    link = replace(PATIENT, **settings.get("link", {}))
    options = ServerOptions(
        **settings.get("options", {}),
        patience=Patience(**settings.get("patience", {})),
        link=link,
    )
    backend = DoubleBackend(
        step_s=settings.get("step_s", 0.002),
        max_running=settings.get("max_running", 4),
        max_kv_tokens=settings.get("max_kv_tokens", 100_000),
    )
    folder = settings.get("keys")
    server = Server(
        backend,
        endpoint.parse(settings["address"]),
        keys=None if folder is None else keys.server_keys(Path(folder)),
        options=options,
        version="double",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    code = server.run(on_bound=lambda address: print(address, flush=True))  # noqa: T201
    if not server.close():
        os._exit(code)
    return code


def _make_the_time_of_day_jump() -> None:
    now, jumps = time.time, [0]

    def jumping() -> float:
        jumps[0] += 1
        return now() + (86_400 if jumps[0] % 2 else -86_400)

    time.time = jumping


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
