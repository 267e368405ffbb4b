"""What a run shows while it trains, and what evaluating and generating show: a progress bar on a terminal, elsewhere plain lines.

A notebook is no terminal: it gets the lines. Colours are rich's, which leaves them out where NO_COLOR is set.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowrank.formatting import format_number

SHARES = ("mfu", "waiting")  # shown in percent
BAR, TIME, GAPS = 20, 8, 3  # characters of a terminal's line beside the step and the values
PAUSE = 60.0  # seconds between two plain lines on stderr


def is_live(stream: TextIO | None = None) -> bool:
    """Whether stdout, or `stream`, is a terminal that can draw a line anew."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@contextlib.contextmanager
def progress(steps: int, first: int) -> Iterator[Callable[[int, dict[str, float] | None], None]]:
    """Yield `show(step, scalars)`, to be called when `step` is done, with scalars where a line is due. What is printed meanwhile
    appears above the bar.

    The line has the step, the time left and the first scalar, the loss; further ones, and the bar, as there is room.
    """
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(BAR), TimeRemainingColumn())
    values_column = TextColumn("{task.description}", markup=False)
    with Progress(*columns, values_column, disable=not is_live(), speed_estimate_period=600) as bar:
        task = bar.add_task("starting", total=steps, completed=first)
        room = bar.console.width - len(f"step {steps}/{steps}") - TIME - GAPS
        if room < 2 * BAR:
            bar.columns = (columns[0], columns[2], values_column)
        else:
            room -= BAR

        def show(step: int, scalars: dict[str, float] | None) -> None:
            named = {name.split("/")[1]: x for name, x in (scalars or {}).items()}
            values = [f"{name} {f'{x:.1%}' if name in SHARES else format_number(x)}" for name, x in named.items()]
            fit = [i for i in range(len(values)) if len("  ".join(values[: i + 1])) <= room] or [0]
            bar.update(task, completed=step, description="  ".join(values[: fit[-1] + 1]) or None)
            if values and bar.disable:
                print(f"step {step}/{steps}  {'  '.join(values)}", flush=True)

        yield show


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[float], None]]:
    """Yield `show(done)`, to be called when so many of `total` (None: not known) are done. It goes to stderr, and on a terminal is gone at the end:
    stdout, which may be a file, gets nothing of it."""
    count = "{task.completed:,.0f}" + ("/{task.total:,.0f}" if total else "")
    columns = (TextColumn(f"{what} {count}"), BarColumn(BAR), TimeRemainingColumn() if total else TimeElapsedColumn())
    on_stderr = rich.console.Console(stderr=True, force_jupyter=False, soft_wrap=True)
    options = {"transient": True, "redirect_stdout": sys.stdout.isatty(), "speed_estimate_period": 600}
    with Progress(*columns, console=on_stderr, disable=not is_live(sys.stderr), **options) as bar:
        task, began = bar.add_task("", total=total), time.monotonic()
        said = began

        def show(done: float) -> None:
            nonlocal said
            bar.update(task, completed=done)
            now = time.monotonic()
            if bar.disable and now - said >= PAUSE:
                said, line = now, f"{what} {done:,.0f}"
                if total:
                    left = datetime.timedelta(seconds=round((now - began) / done * (total - done)))
                    line += f"/{total:,}  {left} left"
                print(line, file=sys.stderr, flush=True)

        yield show
