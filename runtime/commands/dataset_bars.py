"""The screen of a collection: a bar a data set, and its figures once it is done."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .display import stderr_console

if TYPE_CHECKING:
    from ...collect.collection import Progress


class _ConsoleLines(logging.Handler):
    """Log records as whole lines on a console."""

    def __init__(self, console: Any) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), soft_wrap=True, markup=False)


@contextmanager
def dataset_bars() -> Iterator[Callable[[Progress], None]]:
    """A bar a data set with its speed and coverage; on a terminal only."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} traces/s, coverage {task.fields[coverage]:.1%}"),
        TimeRemainingColumn(),
        console=stderr_console(),
        disable=not sys.stderr.isatty(),
    ) as bars:
        # Each data set's figures, above the bars or, off a terminal, as plain lines.
        handler = _ConsoleLines(bars.console)
        logger = logging.getLogger("outrider.collect")
        logger.addHandler(handler)
        tasks: dict[str, Any] = {}

        def tell(progress: Progress) -> None:
            if progress.dataset not in tasks:
                tasks[progress.dataset] = bars.add_task(
                    progress.dataset, total=progress.total, speed=0.0, coverage=0.0
                )
            bars.update(
                tasks[progress.dataset],
                completed=progress.done,
                speed=progress.traces_per_s,
                coverage=progress.coverage,
            )

        try:
            yield tell
        finally:
            logger.removeHandler(handler)
