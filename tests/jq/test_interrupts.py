"""Signals wait for the end of a block."""

import os
import signal
import threading

import pytest

from jq.interrupts import held_back


@pytest.fixture
def caught():
    """Numbers of the SIGTERMs that came through."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_a_signal_comes_after_the_block(caught):
    with held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == []
    assert caught == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(caught) == 2


def test_an_interrupt_comes_after_the_block():
    done = []

    def work():
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]


def test_an_error_passes(caught):
    with pytest.raises(ZeroDivisionError), held_back():
        _ = 1 / 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(caught) == 1


def test_other_threads_are_left_alone():
    failures = []

    def work():
        try:
            with held_back():
                pass
        except ValueError as error:  # what Python raises when a thread installs a handler
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
