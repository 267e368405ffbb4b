"""TODO cli.signals"""

import contextlib
import os
import signal

from jax.experimental import multihost_utils

from lowrank.parallel import distributed


@contextlib.contextmanager
def stop_signals():
    """Yields a function that gives the name of the signal that asked to stop, or None.

    Of several processes each asks it once in every step, with the step's number; all have the same answer at the same step.
    """
    received: list[str] = []
    if distributed.is_running():
        with _stop_signals_of_all() as stop:
            yield stop
        return

    def handle(number, _):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step=None: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stop_signals_of_all():
    """JAX's runtime takes SIGTERM for a preemption, and finds a step that no process is beyond. So Ctrl-C becomes a SIGTERM."""

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
    finally:
        signal.signal(signal.SIGINT, before)
