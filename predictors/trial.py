"""One trial of a sweep, in whatever process runs it: trained, judged by epoch, or ended early."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FolderError, PredictorError, SettingsError, TrainingDataError
from .fit import Run, train_into
from .journal import Journal, Tell
from .presets import Settings
from .space import PREDICTOR, Range, Space
from .study import open_study, report

RECORD_NAME = "sweep.json"
TRIALS_NAME = "trials"
OBJECTIVE = "validation_recall_at_k_1"
"""Of the next token's experts, mean over layers, on validation documents; the more the better."""


class TrialPruned(Exception):
    """The trial is poor by now; not an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is searched, from which traces, and where to. `given` holds for every trial.

    `trials` is the number there shall be in all, those of earlier runs included.
    """

    space: Space
    traces: tuple[Path, ...]
    folder: Path
    trials: int
    preset: str = "small"
    given: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    max_tokens: int | None = None
    skip_bad: bool = False
    num_threads: int = 1

    @property
    def seed(self) -> int:
        """Of every trial, and of what is proposed."""
        return int(self.given.get("seed", 0))

    @property
    def families(self) -> tuple[str, ...]:
        """Of predictors, by name."""
        one = self.space.get(PREDICTOR)
        return (self.given[PREDICTOR],) if one is None else one.ends()

    def record(self) -> dict[str, Any]:
        """What a resumed sweep must have in common with the one that was begun, as JSON has it."""
        said = {
            "space": {name: _as_written(one) for name, one in self.space.items()},
            "preset": self.preset,
            "options": dict(self.given),
            "traces": [one.resolve().name for one in self.traces],
            "max_tokens": self.max_tokens,
        }
        return json.loads(json.dumps(said))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial as its process is told of it; paths are those of that process's machine."""

    sweep: Sweep
    number: int
    family: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended: `value` is None if it was ended early, or failed with `error`."""

    value: float | None
    seconds: float
    error: str | None = None


def trial_folder(folder: Path, number: int) -> Path:
    """The folder of one trial of the sweep in `folder`: its predictor, once it is trained."""
    return folder / TRIALS_NAME / f"{number:04d}"


def run_trial(trial: Trial, *, tell: Tell | None = None) -> Outcome:
    """Train one trial, or go on with it; its recall after each epoch goes into the study.

    What concerns all trials alike is raised: FolderError, SettingsError, TrainingDataError.
    """
    import torch

    from ..collect.trace import open_traces

    sweep, began = trial.sweep, time.monotonic()
    folder = trial_folder(sweep.folder, trial.number)
    if not (sweep.folder / RECORD_NAME).is_file():
        raise FolderError(
            f"{str(sweep.folder)!r} is not there on {platform.node()}: on a cluster, traces and "
            "--out must be in a folder that all nodes see"
        )
    torch.set_num_threads(sweep.num_threads)
    run = Run(trial.family, trial.settings, folder, resume=True, max_tokens=sweep.max_tokens)
    value, error = None, None
    try:
        about = train_into(
            run,
            open_traces(sweep.traces, skip_bad=sweep.skip_bad),
            tell=None if tell is None else _named(tell, trial.number),
            watch=_Judge(trial),
        )
        value = float(about["metrics"][OBJECTIVE])
    except TrialPruned:
        Journal(folder, resume=True).finish()
    except (FolderError, SettingsError, TrainingDataError):
        raise
    except (PredictorError, MemoryError, torch.OutOfMemoryError) as caught:
        error = str(caught).strip() or type(caught).__name__
    return Outcome(value, round(time.monotonic() - began, 1), error)


class _Judge:
    """Watches a trial's journal: reports each epoch's recall, and ends a trial that is poor."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._study = open_study(trial.sweep.folder)

    def __call__(self, line: Mapping[str, Any]) -> None:
        epoch, recall = line.get("epoch"), line.get("recall_1")
        if epoch is None or recall is None:
            return
        is_poor = report(self._study, self._trial.number, epoch=epoch, value=recall)
        if is_poor and epoch < self._trial.settings.epochs:
            raise TrialPruned


def _as_written(one: Any) -> Any:
    if isinstance(one, Range):
        return {"low": one.low, "high": one.high, "log": one.log, "step": one.step}
    return list(one.values)


def _named(tell: Tell, number: int) -> Tell:
    return lambda what, done, total: tell(f"trial {number}: {what}", done, total)
