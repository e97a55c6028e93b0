"""Processes of this machine for work that is sent to them; none outlives who began them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def process_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """`count` processes that end with the block: at once if it ends by an error.

    SIGTERM becomes SystemExit(143) in the block, if it is the main thread's and had no handler, so
    that temporary files go as well. If this process is killed, its processes end by themselves.
    """
    # Spawned: a copy of a process in which torch has threads would not be whole.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    is_heard = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if is_heard:
        signal.signal(signal.SIGTERM, _exit)
    try:
        with ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent) as pool:
            try:
                yield pool
            except BaseException:
                for process in set(multiprocessing.active_children()) - before:
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if is_heard:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent() -> None:
    """Let this process end when the one that began it is gone, however that went."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that multiprocessing began"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
