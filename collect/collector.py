"""Takes traces: windows through a ready model, shard after shard, resumable, always the same rows.

Handed a model and a tokenizer, loads neither. Owns batch boundaries, the answer to a full memory,
the manifest's settings and the log. Writing is `trace`'s, choosing text is `sampling`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .capture import RouterCapture, RoutingRows
from .corpora.corpus import Corpus
from .devices import device_memory
from .diversity import Diversity, DiversitySummary
from .errors import OutOfMemoryError
from .plan import plan_manifest, serialized_tokenizer
from .routers import RouterSet, decoder, find_routers, model_device
from .sampling import Samples, choose_samples
from .schema import ModelShape
from .settings import CollectSettings
from .trace.batch import Selection
from .trace.columns import SPLITS
from .trace.manifest import Manifest
from .trace.reader import TraceReader
from .trace.writer import ShardRows, TraceWriter

log = logging.getLogger("outrider.collect")

LOG_NAME = "collection.log"


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after every batch: samples done and planned of one data set, its speed and its
    coverage.
    """

    dataset: str
    done: int
    total: int
    traces_per_s: float
    coverage: float


@dataclass(slots=True)
class CollectReport:
    """What was collected in all; `seconds` is this run's own time, planning left out."""

    manifest: Manifest
    seconds: float = 0.0
    forward_s: float = 0.0
    new_traces: int = 0
    datasets: dict[str, DiversitySummary] = field(default_factory=dict)
    overall: DiversitySummary | None = None
    nbytes: int = 0


def collect(
    model: Any,
    tokenizer: Any,
    corpora: Sequence[Corpus],
    *,
    shape: ModelShape,
    out: Path,
    settings: CollectSettings,
    model_name: str,
    model_format: str,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CollectReport:
    """Collect into `out` until every planned trace is in a finished shard; blocks until then.

    With `resume`, batch size, threads and shard size come from the folder's manifest, and what is
    already finished is not run again; the rows are those of an uninterrupted run. Every error
    leaves the finished shards in place. Raises NoRoutersError, CorpusError, ResumeError,
    DirectoryInUseError, OutOfSpaceError, OutOfMemoryError.
    """
    routers = find_routers(model)
    routers.check(shape)
    samples = choose_samples(
        corpora,
        tokenizer,
        traces=settings.traces,
        context_tokens=settings.context_tokens,
        seed=settings.seed,
    )
    manifest = plan_manifest(
        model,
        routers,
        samples,
        shape=shape,
        settings=settings,
        tokenizer=tokenizer,
        model_name=model_name,
        model_format=model_format,
    )
    with TraceWriter(out, manifest, resume=resume) as writer, _logging_to(out / LOG_NAME):
        tensors, metadata = routers.tensors()
        writer.write_routers(tensors, metadata)
        serialized = serialized_tokenizer(tokenizer)
        if serialized is not None:
            writer.write_tokenizer(serialized)
        run = _Run(model, routers, writer, samples, progress)
        with _threads(writer.manifest.threads):
            return run.collect()


class _Run:
    """One run over the planned samples: what is shared between shards."""

    def __init__(
        self,
        model: Any,
        routers: RouterSet,
        writer: TraceWriter,
        samples: Sequence[Samples],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._decoder = decoder(model)
        self._device = model_device(model)
        self._writer = writer
        self._samples = samples
        self._progress = progress
        self._manifest = writer.manifest
        self._capture = RouterCapture(
            routers,
            probabilities=self._manifest.probabilities,
            hidden_layers=self._manifest.hidden_layers,
        )
        shards = self._manifest.shards
        self._batch_size = shards[-1].batch_size if shards else self._manifest.batch_size
        self._report = CollectReport(self._manifest)
        self._counts = {chosen.name: Diversity(self._manifest.shape) for chosen in samples}

    def collect(self) -> CollectReport:
        began = time.monotonic()
        self._count_finished()
        with self._capture:
            for chosen, entry in zip(self._samples, self._manifest.datasets, strict=True):
                self._dataset(chosen, entry.first_sample)
        self._writer.finish()
        overall = Diversity(self._manifest.shape)
        for counts in self._counts.values():
            overall.merge(counts)
        report = self._report
        report.manifest = self._writer.manifest
        report.seconds = time.monotonic() - began
        report.overall = overall.summary()
        report.nbytes = sum(s.nbytes + s.hidden_nbytes for s in report.manifest.shards)
        log.info("all: %s; %s bytes", _words(report.overall), f"{report.nbytes:,}")
        return report

    def _count_finished(self) -> None:
        """Take what earlier runs finished into the running figures."""
        if not self._manifest.shards:
            return
        reader = TraceReader(self._writer.directory)
        for batch in reader.batches(Selection(weights=False, log_probs=False)):
            self._counts[reader.dataset_names[batch.dataset[0]]].add(batch.topk_ids)
        log.info("resumed: %d samples were finished", self._manifest.num_finished)

    def _dataset(self, chosen: Samples, first_sample: int) -> None:
        counts, began, ran = self._counts[chosen.name], time.monotonic(), 0
        per_shard = self._manifest.samples_per_shard
        for start in range(0, len(chosen), per_shard):
            if first_sample + start < self._writer.manifest.num_finished:
                continue
            end = min(start + per_shard, len(chosen))

            def told(done: int, *, start: int = start, ran: int = ran) -> None:
                if self._progress is not None:
                    seconds = max(time.monotonic() - began, 1e-9)
                    speed = (ran + done) / seconds
                    self._progress(
                        Progress(chosen.name, start + done, len(chosen), speed, counts.coverage)
                    )

            self._shard(chosen, start, end, first_sample=first_sample, counts=counts, told=told)
            ran += end - start
        summary = counts.summary()
        self._report.datasets[chosen.name] = summary
        self._report.new_traces += ran
        memory = device_memory(self._device)
        log.info(
            "%s: %d traces, %s; %s uses %.1f of %.1f GiB",
            chosen.name,
            len(chosen),
            _words(summary),
            memory.name,
            memory.used_bytes / 2**30,
            memory.total_bytes / 2**30,
        )

    def _shard(
        self,
        chosen: Samples,
        start: int,
        end: int,
        *,
        first_sample: int,
        counts: Diversity,
        told: Callable[[int], None],
    ) -> None:
        """Run one shard; where memory is short, all of it again at half the batch size."""
        while True:
            try:
                rows = self._rows(chosen, start, end, counts=counts, told=told)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # Referenced by the traceback, the failed pass would keep its memory.
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._capture.clear()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if self._batch_size == 1:
                raise OutOfMemoryError(
                    f"not even one sample of {self._manifest.context_tokens} tokens fits into "
                    "memory "
                    f"({message}); take a smaller --context-tokens, --load-in-4bit or --max-memory"
                )
            self._batch_size = max(1, self._batch_size // 2)
            log.warning("out of memory; the shard is run again at batch size %d", self._batch_size)
        columns = _columns(chosen, start, end, first_sample=first_sample)
        columns["topk_ids"] = np.concatenate([part.topk_ids for part in rows])
        columns["topk_weights"] = np.concatenate([part.topk_weights for part in rows])
        if self._manifest.probabilities != "none":
            columns["router_log_probs"] = np.concatenate(
                [part.log_probs for part in rows if part.log_probs is not None]
            )
        hidden = {
            layer_idx: torch.cat([part.hidden[layer_idx] for part in rows])
            for layer_idx in self._manifest.hidden_layers
        }
        counts.add(columns["topk_ids"])
        self._writer.write_shard(
            ShardRows(
                dataset=chosen.name,
                first_sample=first_sample + start,
                num_samples=end - start,
                batch_size=self._batch_size,
                columns=columns,
                hidden=hidden,
            )
        )

    def _rows(
        self,
        chosen: Samples,
        start: int,
        end: int,
        *,
        counts: Diversity,
        told: Callable[[int], None],
    ) -> list[RoutingRows]:
        rows = []
        for first in range(start, end, self._batch_size):
            last = min(first + self._batch_size, end)
            rows.append(self._pass(chosen, first, last))
            told(last - start)
        return rows

    def _pass(self, chosen: Samples, first: int, last: int) -> RoutingRows:
        token_ids = torch.from_numpy(chosen.token_ids[first:last]).long()
        lengths = torch.from_numpy(chosen.lengths[first:last])
        keep = torch.arange(token_ids.shape[1])[None, :] < lengths[:, None]
        began = time.monotonic()
        with torch.inference_mode():
            # Padding stands on the right, where causal attention never lets a real token see it.
            mask = None if bool(keep.all()) else keep.long().to(self._device)
            self._decoder(
                input_ids=token_ids.to(self._device), attention_mask=mask, use_cache=False
            )
        self._report.forward_s += time.monotonic() - began
        return self._capture.take(keep)


def _columns(chosen: Samples, start: int, end: int, *, first_sample: int) -> dict[str, np.ndarray]:
    lengths = chosen.lengths[start:end]
    keep = np.arange(chosen.token_ids.shape[1])[None, :] < lengths[:, None]
    position = np.broadcast_to(np.arange(keep.shape[1], dtype=np.uint16), keep.shape)[keep]
    sample_id = np.arange(first_sample + start, first_sample + end, dtype=np.uint32)
    rows = int(lengths.sum())
    return {
        "document_id": np.repeat(chosen.document_id[start:end], lengths),
        "split": np.array(SPLITS, dtype=object)[np.repeat(chosen.split[start:end], lengths)],
        "sample_id": np.repeat(sample_id, lengths),
        "dataset_name": np.full(rows, chosen.name, dtype=object),
        "position": position,
        "document_offset": np.repeat(chosen.offset[start:end], lengths),
        "token_id": chosen.token_ids[start:end][keep].astype(np.uint32),
    }


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _words(summary: DiversitySummary) -> str:
    most, least = summary.most_used, summary.least_used
    return (
        f"coverage {summary.coverage:.1%}, {summary.unique_pairs:,} unique pairs, routing entropy "
        f"{summary.routing_entropy:.2f} bits, most used expert {most[0]}:{most[1]} ({most[2]:.1%} "
        "of "
        f"tokens), least used {least[0]}:{least[1]} ({least[2]:.1%}), "
        f"{summary.experts_per_layer:.1f} experts a layer"
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Products on the CPU change bits with the number of threads, so a resume takes the first
    run's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level, logging.INFO) if level else logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
