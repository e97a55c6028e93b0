"""Takes traces: windows through a ready model, shard after shard, resumable, always the same rows.

Handed a model and a tokenizer, loads neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .collection import CollectReport, Progress, open_collection
from .corpora.corpus import Corpus
from .passes import ShardRunner
from .plan import describe_model
from .routers import find_routers
from .sampling import choose_samples
from .schema import ModelShape
from .settings import CollectSettings


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
    kernels: str = "torch",
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CollectReport:
    """Collect into `out` until every planned trace is in a finished shard; blocks until then.

    With `resume`, batch size, threads and shard size come from the folder's manifest, and what is
    already finished is not run again; the rows are those of an uninterrupted run. `kernels` names
    what computes the model's passes, and a resume with others is refused. Every error
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
    facts = describe_model(
        model, routers, shape=shape, name=model_name, format=model_format, kernels=kernels
    )
    with (
        open_collection(
            facts,
            samples,
            tokenizer,
            out=out,
            settings=settings,
            resume=resume,
            progress=progress,
        ) as collection,
        ShardRunner(model, routers, collection.manifest) as runner,
    ):
        for task in collection.pending():
            name = task.samples.name
            collection.tell(name, 0)
            collection.commit(runner.run(task, lambda done, name=name: collection.tell(name, done)))
        return collection.finish()
