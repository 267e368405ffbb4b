"""SIGTERM and Ctrl-C as a question that the training loop asks once per step: has somebody asked to stop?

The first signal is only noted, so the loop can finish its step and save; a second Ctrl-C raises KeyboardInterrupt.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from lowrank.parallel import distributed


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[..., str | None]]:
    """Yield `stop(step)`: the name of the signal that asked to stop, or None. Leaves the handlers as they were.

    With several processes each calls it once in every step, and all get the same answer at the same step. In a thread
    other than the main one, where Python allows no handlers, no signal is noted.
    """
    received: list[str] = []

    def note(number, _):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    def pass_on(*_):  # JAX's runtime takes SIGTERM for a preemption, and finds a step that no process is beyond
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    several, before = distributed.is_running(), {}
    if threading.current_thread() is threading.main_thread():
        handlers = {signal.SIGINT: pass_on} if several else {signal.SIGTERM: note, signal.SIGINT: note}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        if several:
            yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        else:
            yield lambda step=None: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler in C, which Python cannot set again
