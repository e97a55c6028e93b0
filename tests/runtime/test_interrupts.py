"""Ctrl-C that Python drops is told at the next step."""

import os
import signal
import threading

import pytest

from outrider.runtime.commands.interrupts import kept_interrupts

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two of these, in here
            pass


def test_an_interrupt_lost_in_a_finalizer_is_raised_at_the_next_step():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), kept_interrupts() as check:
        check()
        Finalized()
        lost = True
        check()
    assert lost and signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_is_raised_where_it_arrives():
    with pytest.raises(KeyboardInterrupt), kept_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
        pytest.fail("nothing was raised")


def test_outside_of_the_main_thread_it_does_nothing():
    def run():
        with kept_interrupts() as check:
            check()
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_an_ignored_interrupt_stays_ignored():
    """As a shell starts its jobs in the background: Ctrl-C is not for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupts() as check:
            os.kill(os.getpid(), signal.SIGINT)
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
