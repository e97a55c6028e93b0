"""A collection while it is made: what is planned, what is finished, what is said of it.

Owns the trace folder, the running figures and the log. Runs no model: finished shards come from
wherever they are made, in any order, and each counts once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .diversity import Diversity, DiversitySummary
from .passes import FinishedShard
from .plan import ModelFacts, ShardTask, plan_manifest, plan_shards, serialized_tokenizer
from .sampling import Samples
from .settings import CollectSettings
from .trace.batch import Selection
from .trace.manifest import Manifest
from .trace.reader import TraceReader
from .trace.writer import TraceWriter

log = logging.getLogger("outrider.collect")

LOG_NAME = "collection.log"


@dataclass(frozen=True, slots=True)
class Progress:
    """Told as samples get through: done and planned of one data set, its speed and its
    coverage.
    """

    dataset: str
    done: int
    total: int
    traces_per_s: float
    coverage: float


@dataclass(slots=True)
class CollectReport:
    """What was collected in all; `seconds` is this run's own time, planning left out, and
    `forward_s` the passes' time, summed over all workers.
    """

    manifest: Manifest
    seconds: float = 0.0
    forward_s: float = 0.0
    new_traces: int = 0
    datasets: dict[str, DiversitySummary] = field(default_factory=dict)
    overall: DiversitySummary | None = None
    nbytes: int = 0


class Collection:
    """The folder of one collection and all that is known of it; made by `open_collection`."""

    def __init__(
        self,
        writer: TraceWriter,
        samples: Sequence[Samples],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._writer = writer
        self._progress = progress
        self._samples = samples
        self._began = time.monotonic()
        self._report = CollectReport(writer.manifest)
        shape = writer.manifest.shape
        self._figures = {chosen.name: _Figures(len(chosen), Diversity(shape)) for chosen in samples}
        self._count_finished()

    @property
    def manifest(self) -> Manifest:
        """The folder's manifest as it is now."""
        return self._writer.manifest

    def pending(self) -> Iterator[ShardTask]:
        """The shards that were not finished when this was called, in sample order."""
        return plan_shards(self._writer.manifest, self._samples)

    def tell(self, dataset: str, running: int) -> None:
        """Report progress: `running` samples of the data set are through, in unfinished shards."""
        if self._progress is None:
            return
        figures = self._figures[dataset]
        now = time.monotonic()
        figures.began = figures.began or now
        done = figures.done + running
        seconds = max(now - figures.began, 1e-9)
        self._progress(
            Progress(
                dataset,
                done,
                figures.total,
                (done - figures.before) / seconds,
                figures.counts.coverage,
            )
        )

    def commit(self, shard: FinishedShard) -> None:
        """Write a finished shard. Blocks on the disk; raises as `TraceWriter.commit`."""
        entry = self._writer.commit(shard.encoded)
        figures = self._figures[entry.dataset]
        figures.counts.merge(shard.counts)
        figures.done += entry.num_samples
        self._report.new_traces += entry.num_samples
        self._report.forward_s += shard.forward_s
        if figures.done == figures.total:
            log.info(
                "%s: %d traces, %s; %s uses %.1f of %.1f GiB",
                entry.dataset,
                figures.total,
                _words(figures.counts.summary()),
                shard.memory.name,
                shard.memory.used_bytes / 2**30,
                shard.memory.total_bytes / 2**30,
            )

    def finish(self) -> CollectReport:
        """Mark the collection as complete and say what it holds."""
        self._writer.finish()
        report, overall = self._report, Diversity(self._writer.manifest.shape)
        for name, figures in self._figures.items():
            report.datasets[name] = figures.counts.summary()
            overall.merge(figures.counts)
        report.manifest = self._writer.manifest
        report.seconds = time.monotonic() - self._began
        report.overall = overall.summary()
        report.nbytes = sum(s.nbytes + s.hidden_nbytes for s in report.manifest.shards)
        log.info("all: %s; %s bytes", _words(report.overall), f"{report.nbytes:,}")
        return report

    def _count_finished(self) -> None:
        """Take what earlier runs finished into the running figures."""
        manifest = self._writer.manifest
        if not manifest.shards:
            return
        reader = TraceReader(self._writer.directory)
        for batch in reader.batches(Selection(weights=False, log_probs=False)):
            self._figures[reader.dataset_names[batch.dataset[0]]].counts.add(batch.topk_ids)
        for shard in manifest.shards:
            figures = self._figures[shard.dataset]
            figures.done += shard.num_samples
            figures.before = figures.done
        log.info("resumed: %d samples were finished", manifest.num_finished)


@contextmanager
def open_collection(
    facts: ModelFacts,
    samples: Sequence[Samples],
    tokenizer: Any,
    *,
    out: Path,
    settings: CollectSettings,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Collection]:
    """Begin or resume the collection in `out`; it is this process's alone inside the block.

    With `resume`, batch size, threads and shard size are those of the folder's manifest. Raises
    ResumeError, DirectoryInUseError, OutOfSpaceError.
    """
    manifest = plan_manifest(facts, samples, settings=settings, tokenizer=tokenizer)
    with TraceWriter(out, manifest, resume=resume) as writer, _logging_to(out / LOG_NAME):
        writer.write_routers(facts.routers)
        serialized = serialized_tokenizer(tokenizer)
        if serialized is not None:
            writer.write_tokenizer(serialized)
        yield Collection(writer, samples, progress)


@dataclass(slots=True)
class _Figures:
    """One data set's running figures; `before` is what earlier runs finished."""

    total: int
    counts: Diversity
    done: int = 0
    before: int = 0
    began: float = 0.0


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
