"""What a fit tells while it runs and keeps for a resume: progress, metric lines, one state file.

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
STATE_NAME = "training.safetensors"

Tell = Callable[[str, int, int], None]


class Journal:
    """The record of one training run in `folder`; called with (what, done, total) as it goes on.

    Only the main process of several keeps a journal that writes: the others hold one without a
    folder that reads the state from `read_from`. Writing blocks on the disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        resume: bool = False,
        tell: Tell | None = None,
        read_from: Path | None = None,
    ) -> None:
        self.folder = folder
        self._source = folder if read_from is None else read_from
        self._resume = resume
        self._tell = tell
        if folder is not None and not resume:
            (folder / METRICS_NAME).unlink(missing_ok=True)
            (folder / STATE_NAME).unlink(missing_ok=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Progress of `what`, for a bar or nothing."""
        if self._tell is not None:
            self._tell(what, done, total)

    def record(self, **metrics: Any) -> None:
        """Add one line of metrics (plain numbers and names)."""
        if self.folder is not None:
            with (self.folder / METRICS_NAME).open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The metric lines so far, oldest first; a torn last line is left out."""
        if self._source is None or not (self._source / METRICS_NAME).exists():
            return []
        text = (self._source / METRICS_NAME).read_text()
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def keep_lines(self, num_lines: int) -> None:
        """Forget metric lines after the first `num_lines`: those of an epoch that is run again."""
        if self.folder is not None:
            kept = self.lines()[:num_lines]
            with durable_write(self.folder / METRICS_NAME) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def save(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Replace the state a resume goes on from, whole or not at all."""
        if self.folder is None:
            return
        from safetensors.numpy import save

        data = save(dict(tensors), {"state": json.dumps(state)})
        with durable_write(self.folder / STATE_NAME) as file:
            file.write(data)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The state to go on from; None where a run starts anew. PredictorError if damaged."""
        if self._source is None or not self._resume:
            return None
        path = self._source / STATE_NAME
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                metadata = file.metadata() or {}
                return {name: file.get_tensor(name) for name in names}, json.loads(
                    metadata["state"]
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise PredictorError(
                f"{str(path)!r} cannot be read ({error}); train again without --resume"
            ) from None

    def finish(self) -> None:
        """The run is over: its state is not needed any more."""
        if self.folder is not None:
            (self.folder / STATE_NAME).unlink(missing_ok=True)
