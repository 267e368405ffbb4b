"""SIGTERM, SIGHUP (the terminal is closed) and Ctrl-C as a question that the training loop asks once per step: has somebody
asked to stop?

The first signal is only noted, so the loop can finish its step and save; a second Ctrl-C raises KeyboardInterrupt. Python runs
handlers between two operations of the main thread, and one of XLA's takes as long as a step or a compilation: so a thread
answers a signal at once, and ends a command in which a second Ctrl-C is not heard.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from lowrank import cli
from lowrank.parallel import distributed

PATIENCE = 2.0  # seconds that a second Ctrl-C waits for the main thread


@contextlib.contextmanager
def stop_signals(first: int | None = None, last: float = float("inf")) -> Iterator[Callable[..., str | None]]:
    """Yield `stop(step)`: the name of the signal that asked to stop, or None. Leaves the handlers as they were.

    With several processes each calls it once in every step, and all get the same answer at the same step. In a thread
    other than the main one, where Python allows no handlers, no signal is noted. `first`, `last`: the step that is done
    already, and that of the end, for what is said.
    """
    received: list[str] = []
    done, heard, several = [first], threading.Event(), distributed.is_running()

    def note(number, _):
        if received and number == signal.SIGINT:
            heard.set()
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    def pass_on(number, _):  # JAX's runtime takes SIGTERM for a preemption, and finds a step that no process is beyond
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def answer(number: int, count: int):
        if count == 1:
            step = "the step" if several or done[0] is None else f"step {min(done[0] + 1, last)}"
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            again = "; again: stop without the step" * (number == signal.SIGINT)
            with contextlib.suppress(OSError):
                print(f"{name}: finishing {step}, then saving{again}", flush=True)
        elif number == signal.SIGINT and cli.in_command and not several and not heard.wait(PATIENCE):
            cli.interrupted()

    def stop(step: int | None = None) -> str | None:
        done[0] = done[0] if step is None else step
        if several:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return received[0] if received else None

    before = {}
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            handlers = dict.fromkeys((signal.SIGINT, signal.SIGHUP), pass_on) if several else {}
            handlers = handlers or dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), note)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
                del handlers[signal.SIGHUP]
            stack.enter_context(_answered(handlers, answer))
            stack.callback(heard.set)
            before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: a handler in C, which Python cannot set again


@contextlib.contextmanager
def _answered(numbers, answer: Callable[[int, int], None]) -> Iterator[None]:
    """Call `answer(number, how many there were)` in a thread for each of these signals, as soon as the kernel brings it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen():
        with open(reader, "rb", buffering=0) as pipe:
            count = 0
            while byte := pipe.read(1):
                if byte[0] in numbers:
                    answer(byte[0], count := count + 1)

    thread = threading.Thread(target=listen, name="answering signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
