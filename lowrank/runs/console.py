"""What a run shows while it trains: a progress bar on a terminal, elsewhere a plain line for each line of metrics."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank.formatting import format_number

SHARES = ("mfu", "waiting")  # shown in percent


@contextlib.contextmanager
def progress(steps: int, first: int) -> Iterator[Callable[[int, dict[str, float] | None], None]]:
    """Yield `show(step, scalars)`, to be called when `step` is done, with scalars where a line is due. What is printed meanwhile
    appears above the bar."""
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("starting", total=steps, completed=first)

        def show(step: int, scalars: dict[str, float] | None) -> None:
            named = {name.split("/")[1]: x for name, x in (scalars or {}).items()}
            values = [f"{name} {f'{x:.1%}' if name in SHARES else format_number(x)}" for name, x in named.items()]
            bar.update(task, completed=step, description="  ".join(values) or None)
            if values and bar.disable:
                print(f"step {step}/{steps}  {'  '.join(values)}", flush=True)

        yield show
