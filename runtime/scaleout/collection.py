"""Routing traces taken by many workers: each keeps the model, this process alone writes the folder.

The rows are those of a local run with the same seed: what a shard holds depends on its samples and
on the manifest, never on who runs it.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...collect.collection import CollectReport, Progress, open_collection
from ...collect.corpora.corpus import Corpus
from ...collect.passes import FinishedShard, ShardRunner
from ...collect.plan import ModelFacts, ShardTask, describe_model
from ...collect.routers import find_routers
from ...collect.sampling import choose_samples
from ...collect.schema import ModelShape
from ...collect.settings import CollectSettings
from ...collect.trace.manifest import Manifest
from ..config import EngineConfig
from .cluster import Cluster
from .pool import WorkerError, WorkerPool

log = logging.getLogger("outrider.collect")

_WORKER = f"{__name__}:ShardWorker"
# How Ray says that it ended a worker because its node was full. Of any other death it says that
# memory may have been the cause.
_KILLED_FOR_MEMORY = "Memory on the node"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSource:
    """The model that each worker loads, as `open_traced` takes it; paths are those of the
    worker's machine.
    """

    model: str | None
    config: EngineConfig
    load_in_4bit: bool = False
    max_memory: Mapping[int | str, int] | None = None
    store: Path | None = None


class ShardWorker:
    """The model in one worker's process. `common` of a run is the manifest as JSON."""

    def __init__(self, source: TracedSource) -> None:
        # Imported here, as below: transformers takes seconds, and other workers have other models.
        from ..traced import open_traced

        self._traced = open_traced(
            source.model,
            source.config,
            load_in_4bit=source.load_in_4bit,
            max_memory=source.max_memory,
            store=source.store,
        )
        traced = self._traced
        self._hold(traced.model, traced.shape, traced.name, traced.format, traced.kernels)

    def _hold(
        self, model: Any, shape: ModelShape, name: str, format: str, kernels: str = "torch"
    ) -> None:
        self._model = model
        self._routers = find_routers(model)
        self._routers.check(shape)
        facts = describe_model(
            model, self._routers, shape=shape, name=name, format=format, kernels=kernels
        )
        self.facts = replace(facts, software=facts.software | _process_versions(facts.device))
        self._manifest = b""
        self._runner: ShardRunner | None = None
        self._done = 0

    def run(self, manifest: bytes, task: ShardTask) -> FinishedShard:
        """One shard."""
        if self._runner is None or manifest != self._manifest:
            if self._runner is not None:
                self._runner.__exit__(None, None, None)
            described = msgspec.json.decode(manifest, type=Manifest)
            self._runner = ShardRunner(self._model, self._routers, described)
            self._runner.__enter__()
            self._manifest = manifest
        self._done = 0
        return self._runner.run(task, self._tell)

    def progress(self) -> int:
        """Samples of the running shard that are through."""
        return self._done

    def _tell(self, done: int) -> None:
        self._done = done


def collect_on_cluster(
    cluster: Cluster,
    source: TracedSource,
    corpora: Sequence[Corpus],
    *,
    out: Path,
    settings: CollectSettings,
    resume: bool = False,
    announce: Callable[[ModelFacts], None] = lambda facts: None,
    progress: Callable[[Progress], None] | None = None,
) -> CollectReport:
    """As `collect`, with the passes on `settings.num_workers` workers; blocks until all is done.

    Text is read and the folder written here. `source.config.num_threads` is what each worker
    computes with. A worker that dies is replaced and its shard done again; if this process dies,
    `resume` goes on, here or without a cluster. `announce` hears the model's facts before anything
    is written. Raises as `collect`, and WorkerError.
    """
    from ..models.loading import load_tokenizer, resolve_folder

    config = source.config
    tokenizer = load_tokenizer(resolve_folder(source.model, revision=config.revision))
    pool: WorkerPool[ShardTask, FinishedShard] = WorkerPool(
        cluster,
        _WORKER,
        (source,),
        num_workers=settings.num_workers,
        cpus=config.num_threads or 1,
        gpus=1 if _wants_gpu(config.device, cluster.gpus) else 0,
    )
    with pool:
        return collect_with(
            pool,
            tokenizer,
            corpora,
            out=out,
            settings=settings,
            resume=resume,
            announce=announce,
            progress=progress,
        )


def collect_with(
    pool: WorkerPool[ShardTask, FinishedShard],
    tokenizer: Any,
    corpora: Sequence[Corpus],
    *,
    out: Path,
    settings: CollectSettings,
    resume: bool = False,
    announce: Callable[[ModelFacts], None] = lambda facts: None,
    progress: Callable[[Progress], None] | None = None,
) -> CollectReport:
    """`collect_on_cluster` with workers that have begun to start, and the tokenizer they imply."""
    # The workers load the model while the text is chosen here.
    samples = choose_samples(
        corpora,
        tokenizer,
        traces=settings.traces,
        context_tokens=settings.context_tokens,
        seed=settings.seed,
    )
    facts = pool.facts(refuse_differences)
    announce(facts)
    with open_collection(
        facts, samples, tokenizer, out=out, settings=settings, resume=resume, progress=progress
    ) as collection:
        plan = _Plan(collection.manifest)
        running: dict[str, dict[int, int]] = {chosen.name: {} for chosen in samples}

        def told(task: ShardTask, done: int) -> None:
            here = running[task.samples.name]
            here[task.first_sample] = done
            collection.tell(task.samples.name, sum(here.values()))

        for task, shard in pool.results(
            collection.pending(), plan.serialized, on_death=plan.on_death, told=told
        ):
            collection.commit(shard)
            told(task, 0)
        return collection.finish()


class _Plan:
    """The manifest as workers are given it; its batch size is halved where memory ended one."""

    def __init__(self, manifest: Manifest) -> None:
        sizes = [manifest.batch_size, *(shard.batch_size for shard in manifest.shards)]
        self.manifest = msgspec.structs.replace(manifest, batch_size=min(sizes), shards=())

    def serialized(self) -> bytes:
        return msgspec.json.encode(self.manifest)

    def on_death(self, task: ShardTask, error: BaseException) -> None:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        end = task.first_sample + len(task.samples) - 1
        log.warning(
            "a worker died at samples %d to %d and is replaced: %s", task.first_sample, end, reason
        )
        if _KILLED_FOR_MEMORY in str(error) and self.manifest.batch_size > 1:
            smaller = self.manifest.batch_size // 2
            self.manifest = msgspec.structs.replace(self.manifest, batch_size=smaller)
            log.warning("memory ended it: batch size %d from now on", smaller)


def refuse_differences(first: ModelFacts, other: ModelFacts) -> None:
    """WorkerError naming each difference that could make two workers' rows differ.

    Two cards of different name may round differently: that is logged, not refused.
    """
    differences = []
    for name in ("shape", "format", "dtype", "device", "threads", "scoring", "kernels"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            differences.append(f"{name}: {mine}, {theirs}")
    for name in sorted({*first.software, *other.software}):
        mine, theirs = first.software.get(name), other.software.get(name)
        if mine != theirs:
            differences.append(f"{name}: {mine}, {theirs}")
    if differences:
        raise WorkerError(
            f"workers differ ({'; '.join(differences)}), so their rows could too; install the same "
            "versions and give the same model on every machine"
        )
    if first.memory.name != other.memory.name:
        log.warning(
            "workers run on %s and on %s: rows may differ in the last bits by where they were made",
            first.memory.name,
            other.memory.name,
        )


def _process_versions(device: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    if device == "cpu":
        versions["cpu"] = torch.backends.cpu.get_cpu_capability()
    return versions


def _wants_gpu(device: str, gpus: int) -> bool:
    return device.startswith("cuda") or (device == "auto" and gpus > 0)
