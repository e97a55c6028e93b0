"""One training run from trace folders to a predictor's folder: locked, resumable, in one process or
several.

Knows folders and what a run keeps; how a family learns is its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import TrainedFamily, family_class
from .checkpoint import CONFIG_NAME, read_config, save_predictor
from .errors import FolderError, TrainingDataError
from .examples import Examples
from .journal import METRICS_NAME, Journal, Tell, Watch, is_begun
from .presets import Settings

if TYPE_CHECKING:
    from ..collect.trace import TraceReader

LOCK_NAME = ".lock"
EVERY_LAYER = ("ensemble", "lookahead-corrected", "pre-attention")
"""Families that learn from the router inputs of all layers, whatever --features says."""

IN_PASS_ONLY = ("lookahead-corrected", "pre-attention")
"""Families without a forecast before the token, which is what `validation_metrics` judges."""

NO_STATES = ("cluster", "frequent", "pattern", "statistics")
MAX_METRIC_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Run:
    """What to train, from what, and where to. `max_tokens` of the train split are read at most."""

    family: str
    settings: Settings
    folder: Path
    resume: bool = False
    max_tokens: int | None = None


def train_into(
    run: Run,
    readers: Sequence[TraceReader],
    *,
    tell: Tell | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train and write the folder; -> what was written in config.json beside the family's own.

    `watch` ends the training, unfinished, by raising. Blocks for minutes to hours. SettingsError
    for an unknown family; FolderError where the folder is in use or holds what is not asked for;
    TrainingDataError where the traces do not serve.
    """
    family = family_class(run.family)
    is_main = int(os.environ.get("RANK", "0")) == 0
    with ExitStack() as held:
        if is_main:
            held.callback(lock_folder(run.folder).release)
            refuse_folder(run)
        if is_main and (run.folder / CONFIG_NAME).exists():
            # Resumed though it had ended: what it ended with.
            return read_config(run.folder)
        began = time.monotonic()
        layers = _hidden_layers(run, readers)
        train, validation = (
            Examples.read(readers, split, hidden_layers=layers, max_tokens=run.max_tokens)
            for split in ("train", "validation")
        )
        refuse_leak(train, validation)
        journal = Journal(
            run.folder if is_main else None,
            resume=run.resume,
            tell=tell if is_main else None,
            watch=watch,
            read_from=run.folder,
        )
        fitted = family.fit(train, validation=validation, settings=run.settings, progress=journal)
        tensors, config = fitted.state()
        about = {
            "training": {
                "settings": {
                    name: getattr(run.settings, name) for name in Settings.__struct_fields__
                },
                "traces": list(train.sources),
                "train_tokens": len(train),
                "validation_tokens": len(validation),
                "seconds": round(time.monotonic() - began, 1),
                "parameters": int(sum(np.asarray(one).size for one in tensors.values())),
            },
            "metrics": validation_metrics(fitted, validation),
        }
        if is_main:
            save_predictor(
                run.folder,
                family=run.family,
                shape=fitted.shape,
                tensors=tensors,
                config={**config, **about},
            )
            journal.finish()
        return {"family": run.family, **about}


def refuse_folder(run: Run) -> None:
    """FolderError unless the folder is new, or holds what `run` may go on with."""
    folder = run.folder
    if (folder / CONFIG_NAME).exists():
        found = read_config(folder).get("family")
        if run.resume and found == run.family:
            return
        raise FolderError(
            f"{str(folder)!r} already holds a predictor ({found}); choose another --out"
        )
    if is_begun(folder) and not run.resume:
        raise FolderError(
            f"{str(folder)!r} holds an interrupted training; go on with --resume, or choose "
            "another --out"
        )
    own = {LOCK_NAME, METRICS_NAME}
    others = [] if run.resume else sorted({one.name for one in folder.iterdir()} - own)
    if others:
        raise FolderError(
            f"{str(folder)!r} is not empty ({', '.join(others[:3])}); choose a new folder for --out"
        )


def refuse_leak(train: Examples, validation: Examples) -> None:
    """TrainingDataError where a document is in both splits, or one of the test split is in either.

    The split follows from a document's hash, so this happens with traces that were tampered with
    or joined by hand only; training on them would be worth nothing.
    """
    shared = np.intersect1d(train.document_id, validation.document_id)
    if len(shared):
        raise TrainingDataError(
            f"{len(shared)} documents are in the train and in the validation split (the first is "
            f"{int(shared[0])}); collect the traces again"
        )


def validation_metrics(family: TrainedFamily, validation: Examples) -> dict[str, Any]:
    """Recall at k on validation documents before the token, by horizon; {} where none is forecast.

    For a first look; `outrider evaluate` judges on test documents.
    """
    before: Any = getattr(family, "before", family)
    if not hasattr(before, "forecasts"):
        return {}
    found, top_k = {}, family.shape.top_k
    for horizon in range(1, before.horizon + 1):
        rows = validation.rows(horizon)
        rows = rows[:: max(1, len(rows) // MAX_METRIC_ROWS)]
        shares = []
        for part in np.array_split(rows, max(1, len(rows) // 1024)):
            forecast = before.forecasts(validation, part, horizon=horizon)
            best = np.argpartition(-forecast, top_k - 1, axis=2)[:, :, :top_k]
            used = validation.membership(part + horizon - 1)
            shares.append(np.take_along_axis(used, best, axis=2).mean(axis=2))
        by_layer = np.concatenate(shares).mean(axis=0)
        found[f"validation_recall_at_k_{horizon}"] = float(by_layer.mean())
        found[f"validation_recall_at_k_{horizon}_per_layer"] = by_layer.round(4).tolist()
    return found


def _hidden_layers(run: Run, readers: Sequence[TraceReader]) -> list[int]:
    """The router inputs that are read: all, those that were recorded, or none."""
    if run.family in EVERY_LAYER:
        return list(range(readers[0].shape.num_moe_layers))
    if run.family in NO_STATES or run.settings.features == "routing":
        return []
    recorded = [set(reader.manifest.hidden_layers) for reader in readers]
    return sorted(set.intersection(*recorded))


def lock_folder(folder: Path) -> Any:
    """The held lock of an output folder, which is made if need be. FolderError if it is in use."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_NAME, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise FolderError(
            f"another process is training into {str(folder)!r}; wait for it, or choose another "
            "--out"
        ) from None
    except OSError as error:
        raise FolderError(
            f"{str(folder)!r} cannot be written ({error.strerror or error}); choose another --out"
        ) from None
    return lock
