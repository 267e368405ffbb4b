"""Signals to stop: noted once, answered at every step, and no handler is left behind."""

import concurrent.futures
import ctypes
import os
import signal
import threading

import pytest

from lowrank.cli import signals
from lowrank.cli.signals import stop_signals

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(autouse=True)
def no_nohup():
    """A hangup is not ignored, even where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def test_a_hangup_is_ignored_where_it_was_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("done", "said"), [((), "the step"), ((3, 9), "step 4"), ((9, 9), "step 9")])
def test_a_signal_is_answered_at_once(capsys, done, said):
    with stop_signals(*done):
        os.kill(os.getpid(), signal.SIGHUP)
    assert capsys.readouterr().out == f"SIGHUP: finishing {said}, then saving\n"


def test_while_python_hears_nothing_ctrl_c_is_answered_and_a_second_one_ends_the_command(monkeypatch, capsys):
    ended = threading.Event()
    reader, writer = os.pipe()

    def interrupt():
        for _ in range(2):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert ended.wait(60)
        os.write(writer, b".")

    monkeypatch.setattr(signals, "PATIENCE", 0)
    monkeypatch.setattr(signals.cli, "in_command", True)
    monkeypatch.setattr(signals.cli, "interrupted", ended.set)
    with stop_signals(3, 9) as stop:
        assert stop(4) is None
        thread = threading.Thread(target=interrupt)
        thread.start()
        ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)  # as a step of XLA's: not one of Python's
        thread.join()
        assert stop(5) == "SIGINT"
    assert capsys.readouterr().out == "Ctrl-C: finishing step 5, then saving; again: stop without the step\n"
    os.close(reader), os.close(writer)


def test_another_thread_than_the_main_one_never_stops():
    def ask():
        with stop_signals() as stop:
            return stop(1)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() is None
