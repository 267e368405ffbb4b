"""Signals to stop: noted once, answered at every step, and no handler is left behind."""

import concurrent.futures
import os
import signal

import pytest

from lowrank.cli.signals import stop_signals

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_the_handlers_are_restored(number):
    before = [signal.getsignal(number) for number in NUMBERS]
    with stop_signals() as stop:
        assert stop(1) is None
        os.kill(os.getpid(), number)
        assert stop(2) == stop(3) == number.name
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_second_interrupt_is_raised_and_the_handlers_are_restored():
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_another_thread_than_the_main_one_never_stops():
    def ask():
        with stop_signals() as stop:
            return stop(1)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() is None
