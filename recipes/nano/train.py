"""Trains outrider-nano on a CPU, in float32, resumable at any time.

Owns the loop, the schedule and the saved state. A warm-up, a constant phase, then a linear decay to
zero whose length is a fraction of the run, so that a run can be ended early and still end well.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.runtime.models.deepseek import DeepseekConfig, DeepseekForCausalLM

from . import experts
from .corpus import DOMAINS
from .data import Windows, bytes_per_token
from .optimizer import MuonAdamW
from .tokenizer import CONTEXT, VOCAB_SIZE
from .worker import Crew, PartResult, Worker

CONFIG = DeepseekConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_hidden_layers=9,
    num_attention_heads=6,
    num_key_value_heads=6,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    max_position_embeddings=CONTEXT,
    aux_loss_alpha=0.01,
    bos_token_id=0,
    eos_token_id=0,
)


@dataclass(slots=True)
class Plan:
    """What a run is asked for. `until` is a wall-clock time (seconds since 1970) by which the decay
    has ended.
    """

    tokens: int = 9_000_000
    decay_fraction: float = 0.25
    until: float | None = None
    length: int = 512
    constant_length: int = 256
    sequences: int = 12
    microbatch: int = 3
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    warmup_steps: int = 40
    save_every_s: float = 300.0
    validate_every: int = 1_000_000
    validation_windows: int = 16
    seed: int = 20261122


@dataclass(slots=True)
class Progress:
    """How far a run is; saved with the weights."""

    step: int = 0
    tokens: int = 0
    target: int = 0
    decaying: bool = False
    train_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def progress_of(state: Path) -> Progress:
    """How far the run was when it wrote a state file."""
    with safe_open(state, "pt") as file:
        return Progress(**json.loads(file.metadata()["progress"]))


class Trainer:
    """One run in one folder: `data` holds the token streams, `folder` the state, the log and the
    figures.
    """

    def __init__(
        self, data: Path, folder: Path, plan: Plan, *, config: DeepseekConfig = CONFIG
    ) -> None:
        torch.manual_seed(plan.seed)
        self.folder, self.plan = folder, plan
        self.model = DeepseekForCausalLM(config).float()
        self.model.set_experts_implementation(experts.register())
        self.optimizer = MuonAdamW(self.model)
        self.progress = Progress(target=plan.tokens)
        self.train = Windows(data, "train", length=plan.length)
        self.validation = Windows(data, "validation", length=plan.length)
        self.token_bytes = bytes_per_token(data)
        self._decay_now = self._stopping = False
        self._speeds: deque[tuple[float, int]] = deque(maxlen=100)
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self._load()
        torch.set_num_threads(1)
        self.crew = Crew(Worker(self.model), plan.workers)

    @property
    def state_file(self) -> Path:
        """The whole resumable state, one file, replaced atomically."""
        return self.folder / "state.safetensors"

    @property
    def undecayed_file(self) -> Path:
        """The state in which the decay began: what a longer run goes on from."""
        return self.folder / "before-decay.safetensors"

    def run(self) -> bool:
        """Trains until the plan's tokens are seen or its time is over; -> whether it got there.

        SIGUSR1 begins the decay at once, SIGTERM saves and returns False.
        """
        previous = {
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._begin_decay),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop),
        }
        saved = time.monotonic()
        try:
            while (multiplier := self._multiplier()) > 0:
                if self._stopping:
                    self.save()
                    return False
                self.step(multiplier)
                if time.monotonic() - saved > self.plan.save_every_s:
                    self.save()
                    saved = time.monotonic()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.progress.target = self.progress.tokens
        if not self._validated():
            self.validate()
        self.save()
        return True

    def step(self, multiplier: float) -> float:
        """One optimiser step at `multiplier` of the full rates; -> the mean nats a token."""
        start, plan = time.monotonic(), self.plan
        batch = self.train.batch(self.progress.step, sequences=plan.sequences)
        parts = batch.split(plan.microbatch)
        # Attention over half the window costs half; the decay phase restores the whole.
        context = plan.length if multiplier < 1 else plan.constant_length
        results = self.crew.backward(parts, context, scale=1 / len(parts))
        progress = self.progress
        progress.step += 1
        progress.tokens += batch.shape[0] * plan.length
        warmup = min(1.0, progress.step / max(plan.warmup_steps, 1))
        self.optimizer.step(progress.step, multiplier * warmup, crew=self.crew)
        elapsed = time.monotonic() - start
        progress.train_seconds += elapsed
        self._speeds.append((elapsed, batch.shape[0] * plan.length))
        loss = sum(result.loss for result in results) / len(results)
        self._log_step(batch, results, loss=loss, rate=multiplier)
        if (
            progress.tokens // plan.validate_every
            > (progress.tokens - batch.shape[0] * plan.length) // plan.validate_every
        ):
            self.validate()
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Bits per UTF-8 byte of each domain on the first windows of its validation documents;
        logged and kept.
        """
        figures = {}
        for domain in DOMAINS:
            count = min(self.plan.validation_windows, self.validation.count(domain))
            nats = total_bytes = 0.0
            for number in range(count):
                window = torch.from_numpy(self.validation.window(domain, number))
                logits = self.model(window[None, :-1], use_cache=False).logits[0]
                nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
                total_bytes += self.token_bytes[window[1:]].sum().item()
            figures[domain] = nats / math.log(2) / max(total_bytes, 1)
        figures["mean"] = sum(figures.values()) / len(DOMAINS)
        self.progress.history.append({"tokens": self.progress.tokens, **figures})
        self._log(
            "validation " + " ".join(f"{name}={value:.4f}" for name, value in figures.items())
        )
        return figures

    def _validated(self) -> bool:
        history = self.progress.history
        return bool(history) and history[-1]["tokens"] == self.progress.tokens

    def save(self, path: Path | None = None) -> None:
        """Writes weights, optimiser state and progress as one file, whole or not at all."""
        path = path or self.state_file
        tensors = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state.items()}
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(self.progress))})
        temporary.replace(path)

    def _load(self) -> None:
        path, progress = self.state_file, progress_of(self.state_file)
        if progress.tokens == progress.target < self.plan.tokens and self.undecayed_file.exists():
            # The run had ended: more tokens are learned from the weights before its decay.
            path, progress = self.undecayed_file, progress_of(self.undecayed_file)
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}"))
            for name, value in self.optimizer.state.items():
                value.copy_(file.get_tensor(f"optimizer.{name}"))
        self.progress = progress
        progress.target = self.plan.tokens
        self._log(f"resumed at step {progress.step}, {progress.tokens} tokens")

    def _begin_decay(self, *_: object) -> None:
        self._decay_now = True

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _multiplier(self) -> float:
        """1 in the constant phase, falling linearly to 0 at the end, whichever of tokens and time
        comes first.
        """
        progress, plan = self.progress, self.plan
        if self._decay_now:
            self._decay_now = False
            progress.target = min(progress.target, int(progress.tokens / (1 - plan.decay_fraction)))
        total = progress.target
        if plan.until is not None and self._speeds:
            seconds, tokens = (sum(column) for column in zip(*self._speeds, strict=True))
            left = max(plan.until - time.time(), 0.0)
            total = min(total, progress.tokens + int(left * tokens / seconds))
        multiplier = min(1.0, (1 - progress.tokens / max(total, 1)) / plan.decay_fraction)
        if multiplier < 1 and not progress.decaying:
            self.save(self.undecayed_file)
            progress.decaying = True
        return multiplier if multiplier > 0.004 else 0.0

    def _log_step(
        self, batch: Tensor, results: list[PartResult], *, loss: float, rate: float
    ) -> None:
        targets = batch[:, 1:]
        bits = loss * targets.numel() / math.log(2) / max(self.token_bytes[targets].sum().item(), 1)
        seconds, tokens = (sum(column) for column in zip(*self._speeds, strict=True))
        counts = torch.stack([result.counts for result in results]).sum(0)
        used = (counts > 0).sum(-1).min().item()
        balance = sum(result.balance for result in results) / len(results)
        self._log(
            f"step={self.progress.step} tokens={self.progress.tokens} loss={loss:.4f} "
            f"bpb={bits:.4f} tok/s={tokens / seconds:.0f} balance={balance:.4f} "
            f"min_experts_used={used:.0f} rate={rate:.3f}"
        )

    def _log(self, line: str) -> None:
        with (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
