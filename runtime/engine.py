"""The generation engine: requests in, tokens out, one pass at a time.

`step` is schedule, run, apply. Knows neither commands nor sockets; `tier` puts its parts together.
"""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Rows
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from ..predictors.base import Predictor
from . import admission
from .config import EngineConfig
from .detokenizer import Detokenizer
from .device import device_of
from .errors import DeviceLostError, OutriderError, UsageError
from .generation import GenerationChunk, GenerationResult
from .models import adapter
from .models.loading import LoadedModel, load_model, load_tokenizer, resolve_folder
from .prefixes import PrefixCache
from .prompt import Prompt, encode, is_one, request_of
from .request import GenerationRequest, SamplingParams
from .runner import ModelRunner
from .sampler import Sampler
from .scheduler import BatchLimits, ScheduledBatch, ScheduledSpan, Scheduler
from .sequence import Sequence
from .stats import ExpertTraffic, ExpertUsage, GenerationStats, GenerationTimings, StepStats
from .tier import ExpertTier, build_tier, expert_source

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str, int, int], None]


class Engine:
    """A loaded model that generates. Not thread-safe: one thread calls it; calls block.

    `traffic` and `stall_s` are totals over all passes, `num_failures` counts the passes in a row
    that failed. `is_native`: passes go through native calls, past the model's own modules.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tier: ExpertTier,
        *,
        config: EngineConfig,
        tokenizer: Any,
        limits: BatchLimits | None = None,
    ) -> None:
        self.loaded = loaded
        self.tier = tier
        self.config = config
        self.tokenizer = tokenizer
        self.load_s = 0.0
        self.vocab_size: int = loaded.config.vocab_size
        # Without a limit in the configuration only memory bounds a text.
        self.max_length = adapter.context_length(loaded.config) or sys.maxsize
        self._runner = ModelRunner(loaded, tier.executor, num_threads=config.num_threads)
        self.is_native = self._runner.prompts_are_exact
        self.limits = admission.settled(limits or BatchLimits(), loaded)
        self.traffic = ExpertTraffic()
        self.stall_s = 0.0
        self.num_failures = 0
        self._prefixes = self._prefix_cache()
        self._scheduler: Scheduler[Sequence] = Scheduler(self.limits, leftovers=self._prefixes)
        self._is_closed = False
        self._lost: DeviceLostError | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        store: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Load a local folder, a hub id or, with None, the built-in model.

        `options` are the fields of `EngineConfig` (`expert_memory="8GiB"`, `predictor=...`,
        `device=...`). `store` is a packed expert store to use instead of the cached one. Blocks
        while weights are read and, the first time a format is asked for, packed;
        `progress(what, done, total)` is told. Raises OutriderError.
        """
        return cls.from_config(EngineConfig(**options), model=model, store=store, progress=progress)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        model: str | Path | None = None,
        store: Path | None = None,
        limits: BatchLimits | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """As `from_pretrained`, for a configuration that is made already.

        `limits` left out are the defaults, with the KV cache bounded by the memory left over.
        """
        began = time.perf_counter()
        device = device_of(config.device)
        if device.type == "cpu" and config.host_memory != "auto":
            raise UsageError(
                "host_memory: without a GPU the expert slots are host memory; use expert_memory"
            )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)

        def told(what: str) -> Callable[[int, int], None]:
            return lambda done, total: None if progress is None else progress(what, done, total)

        folder = resolve_folder(None if model is None else str(model), revision=config.revision)
        loaded = load_model(
            folder,
            dtype=DTYPES.get(config.dtype),
            dense_format=config.dense_format,
            device=device,
            progress=told("loading dense weights"),
        )
        tokenizer = load_tokenizer(folder)
        source = expert_source(loaded, config.format, store=store, progress=told("packing experts"))
        tier = build_tier(loaded, config, source=source)
        try:
            engine = cls(loaded, tier, config=config, tokenizer=tokenizer, limits=limits)
        except BaseException:
            tier.close()
            raise
        tier.warm()
        engine.load_s = time.perf_counter() - began
        return engine

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | None = None
    ) -> list[GenerationResult]:
        """Generate for one prompt (text or token ids) or several at once; results in their order.

        Raises UsageError before anything runs, TransferError if an expert cannot be read.
        """
        params = params or SamplingParams()
        many: Any = [prompts] if is_one(prompts) else list(prompts)
        sequences = [self._sequence(prompt, params) for prompt in many]
        try:
            for sequence in sequences:
                self._add(sequence)
            while not all(sequence.is_finished for sequence in sequences):
                self.step()
        finally:
            self._drop(sequences)
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
        return [GenerationResult.of(sequence) for sequence in sequences]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[GenerationChunk, None, GenerationResult]:
        """Generate for one prompt and yield a chunk a token; the result is the generator's value.

        Closing the generator, as leaving a loop over it does, cancels what is left.
        """
        sequence = self._sequence(prompt, params or SamplingParams())
        return self._stream(sequence)

    def _stream(self, sequence: Sequence) -> Generator[GenerationChunk, None, GenerationResult]:
        self._add(sequence)
        try:
            num_tokens = num_chars = 0
            while not sequence.is_finished or num_tokens < len(sequence.token_ids):
                if num_tokens == len(sequence.token_ids):
                    self.step()
                if sequence.error is not None:
                    raise sequence.error
                # Steps that others took brought this one further as well.
                token_ids = tuple(sequence.token_ids[num_tokens:])
                if token_ids:
                    text = sequence.text[num_chars:]
                    num_tokens += len(token_ids)
                    num_chars += len(text)
                    yield GenerationChunk(token_ids, text, sequence.finish_reason)
        finally:
            self._drop([sequence])
        return GenerationResult.of(sequence)

    def submit(
        self,
        request: GenerationRequest,
        *,
        owner: str = "",
        prompt_token_ids: list[int] | None = None,
    ) -> Sequence:
        """Queue a request for `step` to run; places in the batch are shared fairly among owners.

        `prompt_token_ids` are the ids of its prompt where they are known already. Raises UsageError
        if it can never run.
        """
        sequence = self._sequence_of(request, prompt_token_ids)
        self._add(sequence, owner=owner)
        return sequence

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a sequence between two steps and give its memory back; nothing if it has ended."""
        if not sequence.is_finished:
            sequence.cancel(reason)
        self._scheduler.forget_finished()

    def pause(self, sequence: Sequence) -> None:
        """Run nothing of a sequence until `resume`; it keeps its memory, but no place."""
        self._scheduler.pause(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a paused sequence run again."""
        self._scheduler.resume(sequence)

    @property
    def num_running(self) -> int:
        """Sequences under way, paused ones among them."""
        return self._scheduler.num_running + self._scheduler.num_paused

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place or for memory."""
        return self._scheduler.num_waiting

    @property
    def has_work(self) -> bool:
        """Whether `step` would find something to run, or to wait for."""
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    def step(self) -> dict[Sequence, str]:
        """One pass over what is queued: the text that each sequence gained. Empty if idle.

        An expert that cannot be read ends the sequences of that pass with an error and leaves the
        engine usable. Raises DeviceLostError, now and at every later call, if the device fails.
        """
        self._refuse_closed()
        batch = self._scheduler.schedule()
        if not batch.spans:
            return {}
        prefilling = {span.sequence for span in batch.spans if span.sequence.is_prefill}
        try:
            output = self._runner.run(batch)
        except OutriderError as error:
            self.num_failures += 1
            for span in batch.spans:
                span.sequence.error = error
                span.sequence.cancel("error")
            if isinstance(error, DeviceLostError):
                self._lost = error
                raise
            return {span.sequence: "" for span in batch.spans}
        self.num_failures = 0
        self.traffic.add(output.traffic)
        self.stall_s += output.stall_s
        for span in batch.spans:
            phase = "prefill" if span.sequence in prefilling else "decode"
            span.sequence.stats.record(
                StepStats(phase, span.num_tokens, output.wall_s, output.stall_s, output.traffic)
            )
        pieces: dict[Sequence, str] = {}
        for row, sequence in enumerate(output.sampled):
            if self._prefixes is not None and not sequence.token_ids:
                self._prefixes.offer(sequence)
            try:
                token = sequence.sampler.sample(output.logits[row], sequence.sampler_state)
            except OutriderError as error:
                # Logits that are no numbers are this sequence's misfortune alone.
                sequence.error = error
                pieces[sequence] = sequence.cancel("error")
                continue
            if not sequence.token_ids:
                sequence.stats.timings.ttft_s = time.perf_counter() - sequence.began_s
            pieces[sequence] = sequence.accept(token)
        return pieces

    def logprobs(self, texts: Rows[Rows[int]]) -> list[torch.Tensor]:
        """Log-probability in nats of each token but the first, given those before it: [n - 1] fp32.

        One pass over all texts (token ids) side by side, apart from what is queued; its logits,
        [tokens of all texts, vocabulary] in fp32, are in memory at once. Raises UsageError for a
        text that is no prompt, TransferError if an expert cannot be read.
        """
        if not texts:
            return []
        sequences = [self._sequence(list(text), SamplingParams(max_tokens=1)) for text in texts]
        spans: list[ScheduledSpan[Sequence]] = []
        start = 0
        for sequence in sequences:
            end = start + sequence.num_pending
            spans.append(ScheduledSpan(sequence, start, end, is_last=True))
            start = end
        logits = self._runner.run(ScheduledBatch(tuple(spans)), every_row=True).logits
        return [
            -torch.nn.functional.cross_entropy(
                logits[span.start : span.end - 1],
                torch.tensor(
                    span.sequence.prompt_token_ids[1:], dtype=torch.long, device=logits.device
                ),
                reduction="none",
            )
            for span in spans
        ]

    def close(self) -> None:
        """Stop reading and free the expert memory; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._runner.close()
            self.tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise UsageError("the engine is closed; make a new one")
        if self._lost is not None:
            raise self._lost

    def _prefix_cache(self) -> PrefixCache | None:
        limit = self.limits.max_kv_tokens
        if not self.limits.prefix_share or limit is None or not self.is_native:
            return None
        return PrefixCache(int(limit * self.limits.prefix_share))

    def _predictor(self, token_ids: list[int]) -> Predictor | None:
        try:
            predictor = self.tier.make_predictor()
            if predictor is not None:
                predictor.begin(np.asarray(token_ids, dtype=np.int64))
        except Exception as error:  # whatever goes wrong in it costs speed only
            logger.warning("predictor %s cannot begin: %s", self.tier.predictor_name, error)
            self.tier.executor.mark_degraded()
            return None
        return predictor

    def _add(self, sequence: Sequence, *, owner: str = "") -> None:
        num_kv_tokens = admission.reserved_tokens(
            len(sequence.prompt_token_ids), sequence.params.max_tokens, limits=self.limits
        )
        self._scheduler.add(sequence, owner=owner, num_kv_tokens=num_kv_tokens)

    def _sequence(self, prompt: Any, params: SamplingParams) -> Sequence:
        return self._sequence_of(request_of(prompt, params), None)

    def _sequence_of(
        self, request: GenerationRequest, prompt_token_ids: list[int] | None
    ) -> Sequence:
        self._refuse_closed()
        params = request
        token_ids = prompt_token_ids
        if token_ids is None:
            token_ids = encode(self.tokenizer, request)
        request.validate_against(self.vocab_size, self.max_length, prompt_token_ids=token_ids)
        sampler = Sampler(params, vocab_size=self.vocab_size, device=self.loaded.device)
        shape, slots = self.loaded.shape, self.tier.num_slots
        slot_bytes = self.tier.source.nbytes
        return Sequence(
            prompt_token_ids=token_ids,
            params=params,
            sampler=sampler,
            sampler_state=sampler.begin(token_ids),
            detokenizer=Detokenizer(self.tokenizer, stop=params.stop, prompt_token_ids=token_ids),
            predictor=self._predictor(token_ids),
            stats=GenerationStats(
                GenerationTimings(load_s=self.load_s),
                ExpertUsage(shape.num_routed_experts, slots, slots * slot_bytes, slot_bytes),
            ),
            end_token_ids=self.loaded.end_token_ids,
        )

    def _drop(self, sequences: Rows[Sequence]) -> None:
        for sequence in sequences:
            if not sequence.is_finished:
                sequence.cancel("cancelled")
        self._scheduler.forget_finished()
