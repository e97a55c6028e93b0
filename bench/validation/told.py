"""What a predictor said along an observation, and what saying it took."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..foretold import Foretold


@dataclass(frozen=True, slots=True)
class Told:
    """What a predictor said along an observation, and processor seconds a layer that it took: in
    the pass, where it is asked there, and all else.
    """

    foretold: Foretold
    seconds: float
    in_pass_s: float = 0.0


def timed(make: Callable[[], Any], asked: list[float]) -> "_TimedPredictor":
    """A predictor of `make` that adds to `asked`."""
    return _TimedPredictor(make(), asked)


class _TimedPredictor:
    """A predictor, and processor seconds of each time that it is asked in the pass."""

    def __init__(self, predictor: Any, asked: list[float]) -> None:
        self._predictor = predictor
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def in_pass(self, *arguments: Any) -> Any:
        """As the predictor's."""
        began = time.process_time()
        try:
            return self._predictor.in_pass(*arguments)
        finally:
            self._asked.append(time.process_time() - began)
