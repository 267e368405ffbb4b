"""What a run shows while it trains: a progress bar on a terminal, elsewhere a plain line for each line of metrics."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank.formatting import format_number

SHARES = ("mfu", "waiting")  # shown in percent
BAR, TIME, GAPS = 20, 8, 3  # characters of a terminal's line beside the step and the values


def is_live() -> bool:
    """Whether stdout is a terminal that can draw a line anew."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


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
