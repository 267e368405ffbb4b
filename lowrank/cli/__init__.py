"""How a command runs: flags and config in, exit code and one line of error out."""

import contextlib
import os
import signal

in_command = False  # whether this process is a command's, which may be ended
INTERRUPTED = 130  # exit code after a Ctrl-C that saves nothing, as shells count it: 128 + SIGINT


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process with one line until `cli.run` takes over: the imports of JAX, which take seconds, would
    swallow an exception in a callback, or show it as a page."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def interrupted(*_) -> None:
    """End at once; on a terminal with the cursor, which a progress line hides, on a line of its own."""
    with contextlib.suppress(OSError):
        os.write(2, (b"\x1b[?25h\n" if os.isatty(2) else b"") + b"interrupted\n")
    os._exit(INTERRUPTED)
