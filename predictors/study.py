"""optuna's side of a sweep: the journal in its folder, what is proposed next, what is ended early.

Knows spaces and trials by number; trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .space import Choice, Range, Space

if TYPE_CHECKING:
    import optuna

STUDY_NAME = "study.journal"
_NAME = "sweep"

STARTUP_TRIALS = 5
"""Finished trials before one is ended early: after an epoch in which its best is below their median
at that epoch (Golovin et al. 2017, section 3.2.2)."""


def open_study(folder: Path) -> optuna.Study:
    """The study of the sweep in `folder`, begun if it is not there; `study.ask` needs `propose`.

    Any number of processes may hold one. ModuleNotFoundError without optuna.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STUDY_NAME
    is_begun = path.exists()
    storage = JournalStorage(JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    if is_begun and storage.get_all_studies():
        return optuna.load_study(storage=storage, study_name=_NAME, pruner=pruner)
    return optuna.create_study(
        storage=storage, study_name=_NAME, pruner=pruner, direction="maximize"
    )


def mend(folder: Path) -> None:
    """Cut off what a writer left that was killed in the middle of a line, while nobody writes.

    What followed it would be spoilt.
    """
    path = folder / STUDY_NAME
    if not path.exists():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole != len(text):
        with path.open("r+b") as file:
            file.truncate(whole)


def propose(study: optuna.Study, space: Space, *, seed: int) -> optuna.trial.FrozenTrial:
    """Begin the next trial.

    Its sampler has a seed of its own, so that what a resumed sweep proposes does not depend on
    where it was interrupted. Options of trials under way count as poor, so none is tried twice.
    """
    from optuna.samplers import TPESampler

    number = len(study.get_trials(deepcopy=False))
    study.sampler = TPESampler(
        seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    )
    asked = study.ask({name: _distribution(one) for name, one in space.items()})
    return study.get_trials(deepcopy=False)[asked.number]


def report(study: optuna.Study, number: int, *, epoch: int, value: float) -> bool:
    """Note the trial's figure after an epoch; True if it is poor and had better end."""
    frozen = study.get_trials(deepcopy=False)[number]
    # An epoch that is run again after a resume was reported before.
    if epoch not in frozen.intermediate_values:
        storage = study._storage
        storage.set_trial_intermediate_value(frozen._trial_id, epoch, value)
        frozen = storage.get_trial(frozen._trial_id)
    return study.pruner.prune(study, frozen)


def note(study: optuna.Study, number: int, **about: object) -> None:
    """Keep something with a trial that has not ended."""
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    for name, value in about.items():
        study._storage.set_trial_user_attr(trial_id, name, value)


def _distribution(one: Choice | Range) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if isinstance(one, Choice):
        return distributions.CategoricalDistribution(one.values)
    if one.is_whole:
        step = int(one.step or 1)
        return distributions.IntDistribution(int(one.low), int(one.high), log=one.log, step=step)
    return distributions.FloatDistribution(one.low, one.high, log=one.log, step=one.step)
