"""A sweep: many training runs over a space of options, the best by recall on validation documents.

Knows neither processes nor clusters: an Executor runs the trials.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collect.durable import durable_write
from .errors import FolderError, PredictorError, SettingsError
from .fit import IN_PASS_ONLY, LOCK_NAME, lock_folder
from .journal import Tell
from .presets import make_settings
from .space import PREDICTOR
from .study import mend, note, open_study, propose
from .trial import OBJECTIVE, RECORD_NAME, Outcome, Sweep, Trial, run_trial, trial_folder

if TYPE_CHECKING:
    import optuna

BEST_NAME = "best"


class Here(Executor):
    """Runs each trial at once, in this process; `tell` hears of its progress."""

    def __init__(self, tell: Tell | None = None) -> None:
        self._tell = tell

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """fn(*args, tell=..., **kwargs), done when this returns. Blocks."""
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, tell=self._tell, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def run_sweep(
    sweep: Sweep,
    *,
    executor: Executor,
    workers: int = 1,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Run what is missing of the trials, `workers` at a time; -> the document of all. Blocks.

    With one worker the trials follow from the seed, interrupted or not. `told` hears each ended
    trial's row. OUT/best leads to the best trial's folder from the first one on. FolderError where
    the folder is in use or holds what is not asked for; SettingsError, TrainingDataError as
    training; PredictorError if no trial gives a figure.
    """
    _refuse_in_pass(sweep)
    with ExitStack() as held:
        held.callback(lock_folder(sweep.folder).release)
        _begin(sweep)
        mend(sweep.folder)
        study = open_study(sweep.folder)
        begun = [one for one in study.get_trials() if not one.state.is_finished()]
        running: dict[Future[Outcome], Trial] = {}
        while True:
            while len(running) < workers:
                if not begun and len(study.get_trials(deepcopy=False)) >= sweep.trials:
                    break
                frozen = begun.pop(0) if begun else propose(study, sweep.space, seed=sweep.seed)
                trial = _trial(sweep, frozen)
                running[executor.submit(run_trial, trial)] = trial
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(done)
                _end(study, trial, done.result())
                document = _document(sweep, study)
                if document["best"] is not None:
                    _link_best(sweep.folder, document["best"]["trial"])
                told(document["trials"][trial.number])
        document = _document(sweep, study)
    if document["best"] is None:
        errors = [row["error"] for row in document["trials"] if row["error"]]
        raise PredictorError(
            f"none of {len(document['trials'])} trials gave a figure"
            + (f"; the first error: {errors[0]}" if errors else "")
        )
    return document


def _begin(sweep: Sweep) -> None:
    folder, said = sweep.folder, sweep.record()
    path = folder / RECORD_NAME
    if not path.exists():
        others = sorted({one.name for one in folder.iterdir()} - {LOCK_NAME})
        if others:
            raise FolderError(
                f"{str(folder)!r} is not empty ({', '.join(others[:3])}); choose a new folder for "
                "--out"
            )
        with durable_write(path) as file:
            file.write(json.dumps(said, indent=1).encode())
        return
    if not sweep.resume:
        raise FolderError(
            f"{str(folder)!r} holds a sweep; go on with --resume, or choose another --out"
        )
    begun = json.loads(path.read_text())
    for name, value in said.items():
        if begun.get(name) != value:
            raise SettingsError(
                f"the sweep was begun with other {name}: {begun.get(name)!r}, now {value!r}; give "
                "the same, or choose another --out"
            )


def _refuse_in_pass(sweep: Sweep) -> None:
    for name in sweep.families:
        if name in IN_PASS_ONLY:
            raise SettingsError(
                f"sweep: predictor {name!r} forecasts in the pass only, and trials are compared by "
                "recall before the token; train it alone"
            )


def _trial(sweep: Sweep, frozen: optuna.trial.FrozenTrial) -> Trial:
    options = {**sweep.given, **frozen.params}
    family = options.pop(PREDICTOR)
    settings = make_settings(sweep.preset, options)
    return Trial(sweep=sweep, number=frozen.number, family=family, settings=settings)


def _end(study: optuna.Study, trial: Trial, outcome: Outcome) -> None:
    from optuna.trial import TrialState

    note(study, trial.number, seconds=outcome.seconds, error=outcome.error)
    if outcome.value is not None:
        study.tell(trial.number, outcome.value)
    else:
        is_failed = outcome.error is not None
        study.tell(trial.number, state=TrialState.FAIL if is_failed else TrialState.PRUNED)


def _link_best(folder: Path, number: int) -> None:
    beside = folder / f".{BEST_NAME}.tmp"
    beside.unlink(missing_ok=True)
    beside.symlink_to(trial_folder(Path(), number), target_is_directory=True)
    beside.replace(folder / BEST_NAME)


def _document(sweep: Sweep, study: optuna.Study) -> dict[str, Any]:
    trials = study.get_trials(deepcopy=False)
    rows = [_row(sweep, frozen) for frozen in trials]
    complete = [row for row in rows if row["state"] == "complete"]
    return {
        "sweep": str(sweep.folder),
        "objective": OBJECTIVE,
        "settings": sweep.record(),
        "trials": rows,
        # The first of equals.
        "best": max(complete, key=lambda row: row["recall"], default=None),
    }


def _row(sweep: Sweep, frozen: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """`recall` of a trial that did not get to its end is its last epoch's, None if it has none."""
    epochs, state = frozen.intermediate_values, frozen.state.name.lower()
    last = epochs[max(epochs)] if epochs else None
    return {
        "trial": frozen.number,
        "state": "failed" if state == "fail" else state,
        "recall": frozen.value if state == "complete" else last,
        "options": dict(frozen.params),
        "recall_by_epoch": [epochs[epoch] for epoch in sorted(epochs)],
        "seconds": frozen.user_attrs.get("seconds"),
        "folder": str(trial_folder(sweep.folder, frozen.number)),
        "error": frozen.user_attrs.get("error"),
    }
