"""Runs one scheduled batch through the model: the only place where a pass's tensors are made."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..kernels.weights import ExpertWeights
from .errors import DeviceLostError, InsufficientMemoryError
from .executor import ExpertExecutor, SlotTable
from .models import adapter
from .models.attention import RaggedAttention, Span
from .models.loading import LoadedModel
from .models.native_decoder import NativeDecoder
from .observers import Observer
from .scheduler import ScheduledBatch
from .sequence import Sequence
from .stats import ExpertTraffic

if TYPE_CHECKING:
    from .models.device_decoder import DeviceDecoder

# A product of fewer bytes of weights is over before a second thread is awake. nano's tokens/s with
# one thread and with two: 110 and 34 ahead of all other work, 13-27 and 1-2 on a busy machine.
MIN_SHARED_BYTES = 1 << 20
# This many rows are work enough for all threads, however small the model.
MIN_SHARED_TOKENS = 32
# Rows of a pass that a device decodes by itself: more are better grouped by expert.
MAX_DEVICE_ROWS = 8


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A pass's result: logits [sequences that sample, vocabulary] in fp32, and what it took.

    With `every_row` the logits are those of every row of the pass, [T, vocabulary].
    """

    sampled: tuple[Sequence, ...]
    logits: torch.Tensor
    wall_s: float
    stall_s: float
    traffic: ExpertTraffic


class ModelRunner:
    """The model with our attention and experts in place. Blocks for the length of a pass.

    `num_threads` None leaves it to the runner whether a pass is worth more than one thread.
    """

    def __init__(
        self, loaded: LoadedModel, executor: ExpertExecutor, *, num_threads: int | None = None
    ) -> None:
        self._model = loaded.model
        self._layers = loaded.layers
        self._device = loaded.device
        self._executor = executor
        self._attention = RaggedAttention(loaded.model)
        self._decoder = NativeDecoder.of(loaded.model)
        self._device_decoder = None
        if executor.device_weights is not None:
            with self._translated("while the decoder was made"):
                self._device_decoder = _device_decoder(loaded, executor.device_weights)
        self._num_passes = 0
        matrix_bytes = loaded.shape.hidden_size**2 * loaded.dtype.itemsize
        self._is_small = num_threads is None and matrix_bytes < MIN_SHARED_BYTES
        adapter.install(loaded.model, loaded.layers, executor.forward)

    @property
    def prompts_are_exact(self) -> bool:
        """Whether a prompt's keys and values have the same bits in whatever pieces it runs."""
        return self._decoder is not None

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch[Sequence], *, every_row: bool = False) -> StepOutput:
        """One forward pass.

        Raises TransferError if an expert cannot be read, InsufficientMemoryError if memory runs out
        under way: both end this pass and leave the model and its experts usable. Raises
        DeviceLostError if the device fails, which ends all passes.
        """
        with (
            self._translated(f"in a pass of {batch.num_tokens} tokens"),
            _one_thread() if self._device_decoder is not None else nullcontext(),
        ):
            return self._run(batch, every_row=every_row)

    def close(self) -> None:
        """Let go of what the experts' memory is seen through."""
        self._decoder = self._device_decoder = None

    @contextmanager
    def _translated(self, when: str) -> Iterator[None]:
        try:
            # The current device is a thread's own, and kernels are launched on it.
            is_gpu = self._device.type == "cuda"
            with torch.cuda.device(self._device) if is_gpu else nullcontext():
                yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise InsufficientMemoryError(
                f"out of memory {when}: {error}; give a smaller "
                "--expert-memory, or run fewer or shorter requests at once"
            ) from error
        except torch.AcceleratorError as error:
            raise DeviceLostError(
                f"{self._device} failed ({error}); nothing on it can be trusted any more: start "
                "again"
            ) from error

    def _run(self, batch: ScheduledBatch[Sequence], *, every_row: bool) -> StepOutput:
        began = time.perf_counter()
        num_streamed = _num_streamed(batch) if self._decoder is not None else None
        self._begin(batch, num_streamed)
        token_ids = [
            token_id
            for span in batch.spans
            for token_id in span.sequence.pending_token_ids(span.num_tokens)
        ]
        positions = [
            span.sequence.num_computed + offset
            for span in batch.spans
            for offset in range(span.num_tokens)
        ]
        rows = [span.end - 1 for span in batch.spans if span.is_last]
        if every_row:
            rows = list(range(batch.num_tokens))
        with self._threads(batch.num_tokens):
            spans = [Span(span.sequence.kv, span.start, span.end) for span in batch.spans]
            table = self._table(batch, num_streamed)
            if self._device_decoder is not None and self._is_decoded_on_device(batch):
                logits = self._device_decoder.decode(
                    token_ids, positions, spans, experts=self._executor
                )
            elif self._decoder is None or num_streamed is None:
                logits = self._forward(token_ids, positions, spans, rows)
            elif table is not None:
                logits = self._decoder.decode(
                    token_ids,
                    positions,
                    spans,
                    experts=table.weights,
                    slots=table.slots,
                    record=self._executor.record,
                    serve=self._executor.serve,
                    serves_all=self._executor.serves_all,
                )
            else:
                logits = self._decoder.logits(
                    token_ids, positions, spans, num_streamed=num_streamed, rows=rows
                )
        for span in batch.spans:
            span.sequence.num_computed += span.num_tokens
        traffic, stall_s = self._executor.end_step()
        return StepOutput(
            sampled=tuple(span.sequence for span in batch.spans if span.is_last),
            logits=logits.float(),
            wall_s=time.perf_counter() - began,
            stall_s=stall_s,
            traffic=traffic,
        )

    def _table(self, batch: ScheduledBatch[Sequence], num_streamed: int | None) -> SlotTable | None:
        """For a pass of single tokens whose experts nobody else stands before."""
        if num_streamed != batch.num_tokens or not adapter.calls(
            self._layers, self._executor.forward
        ):
            return None
        return self._executor.table()

    def _is_decoded_on_device(self, batch: ScheduledBatch[Sequence]) -> bool:
        return (
            _num_streamed(batch) == batch.num_tokens <= MAX_DEVICE_ROWS
            and self._executor.device_weights is not None
            and adapter.calls(self._layers, self._executor.forward)
        )

    def _forward(
        self, token_ids: list[int], positions: list[int], spans: list[Span], rows: list[int]
    ) -> torch.Tensor:
        with self._attention.over(spans):
            output = self._model(
                input_ids=torch.tensor([token_ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                past_key_values=self._attention.past,
                use_cache=False,
                logits_to_keep=torch.tensor(rows, dtype=torch.long, device=self._device),
            )
        return output.logits[0]

    @contextmanager
    def _threads(self, num_tokens: int) -> Iterator[None]:
        if not self._is_small or num_tokens >= MIN_SHARED_TOKENS:
            yield
            return
        with _one_thread():
            yield

    def _begin(self, batch: ScheduledBatch[Sequence], num_streamed: int | None) -> None:
        observers: list[Observer] = []
        for span in batch.spans:
            sequence = span.sequence
            if not sequence.is_prefill:
                sequence.step += 1
            if sequence.predictor is not None:
                token_id = None if sequence.is_prefill else sequence.token_ids[-1]
                observers.append(
                    Observer(sequence.predictor, span.start, span.end, sequence.step, token_id)
                )
        self._executor.begin_step(self._num_passes, observers, num_streamed=num_streamed)
        self._num_passes += 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """What the host computes beside a device, or of a small model, is over before a second thread
    is awake."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _device_decoder(loaded: LoadedModel, weights: ExpertWeights) -> "DeviceDecoder | None":
    # Imported when asked for: they need Triton, and a device.
    from .models.cuda_graphs import CudaGraphs
    from .models.device_decoder import DeviceDecoder

    decoder = DeviceDecoder.of(loaded.model, CudaGraphs(loaded.device))
    if decoder is not None:
        decoder.prepare(weights)
    return decoder


def _num_streamed(batch: ScheduledBatch[Sequence]) -> int:
    """Rows of the sequences that decode, which stand before those of prompts."""
    num_rows = 0
    for span in batch.spans:
        if span.sequence.is_prefill:
            break
        num_rows = span.end
    return num_rows
