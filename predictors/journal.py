"""What a fit tells while it runs and keeps for a resume: progress, metric lines, state by part.

Knows no family and no model; a folder is optional, and without one nothing is kept.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..collect.durable import durable_write
from .errors import PredictorError

METRICS_NAME = "metrics.jsonl"

Tell = Callable[[str, int, int], None]

Watch = Callable[[Mapping[str, Any]], None]
"""Hears each metric line once it is written; what it raises ends the training."""


def state_name(part: str) -> str:
    """The file that keeps the state of one part of a training run."""
    return f"training-{part}.safetensors"


def is_begun(folder: Path) -> bool:
    """A training run in `folder` was interrupted and can go on."""
    return any(folder.glob(state_name("*")))


class Journal:
    """The record of one training run in `folder`; called with (what, done, total) as it goes on.

    `watch` may end the run: it hears each metric line and raises.

    Only the main process of several keeps a journal that writes: the others hold one without a
    folder that reads the state from `read_from`. Writing blocks on the disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        resume: bool = False,
        tell: Tell | None = None,
        watch: Watch | None = None,
        read_from: Path | None = None,
    ) -> None:
        self.folder = folder
        self._source = folder if read_from is None else read_from
        self._resume = resume
        self._tell = tell
        self._watch = watch
        if folder is not None and not resume:
            (folder / METRICS_NAME).unlink(missing_ok=True)
            self.finish()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Progress of `what`, for a bar or nothing."""
        if self._tell is not None:
            self._tell(what, done, total)

    def record(self, **metrics: Any) -> None:
        """Add one line of metrics (plain numbers and names); raises what `watch` raises."""
        if self.folder is not None:
            with (self.folder / METRICS_NAME).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        if self._watch is not None:
            self._watch(metrics)

    def lines(self) -> list[dict[str, Any]]:
        """The metric lines so far, oldest first; a torn last line is left out."""
        if self._source is None or not (self._source / METRICS_NAME).exists():
            return []
        text = (self._source / METRICS_NAME).read_text()
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def keep_epochs(self, num_epochs: int) -> None:
        """Forget the metric lines of later epochs, which are run again."""
        if self.folder is not None:
            kept = [line for line in self.lines() if line.get("epoch", 0) <= num_epochs]
            with durable_write(self.folder / METRICS_NAME) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def save(self, part: str, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Replace the state that `part` goes on from after a resume, whole or not at all."""
        if self.folder is None:
            return
        from safetensors.numpy import save

        data = save(dict(tensors), {"state": json.dumps(state)})
        with durable_write(self.folder / state_name(part)) as file:
            file.write(data)

    def load(
        self, part: str, *, begun_with: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The state for `part` to go on from; None where it starts anew.

        `begun_with` must be what the state says of itself under these names. PredictorError where
        it differs, or the file is damaged.
        """
        if self._source is None or not self._resume:
            return None
        path = self._source / state_name(part)
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
                state = json.loads(metadata["state"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise PredictorError(
                f"{str(path)!r} cannot be read ({error}); train again into a new folder"
            ) from None
        for name, value in begun_with.items():
            if state.get(name) != value:
                raise PredictorError(
                    f"the run was begun with other {name}: {_difference(state.get(name), value)}; "
                    "give the same, or train into a new folder"
                )
        return tensors, state

    def finish(self) -> None:
        """The run is over: its state is not needed any more."""
        if self.folder is not None:
            for path in self.folder.glob(state_name("*")):
                path.unlink(missing_ok=True)


def _difference(begun: object, now: object) -> str:
    if isinstance(begun, dict) and isinstance(now, dict):
        names = [name for name in now if begun.get(name) != now[name]]
        return ", ".join(f"{name} {begun.get(name)!r}, now {now[name]!r}" for name in names)
    return f"{begun!r}, now {now!r}"
