"""Ctrl-C that is not lost: Python drops an interrupt raised inside a finalizer or a callback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """SIGINT raises KeyboardInterrupt as ever; the function that is handed out raises it again
    where it came to nothing.

    Call that between two steps of long work. Outside of the main thread, where signals never
    arrive, and where SIGINT is ignored or somebody else's (a job in the background), it does
    nothing.
    """
    pressed = threading.Event()

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
