"""TODO runs.console"""

import sys

import rich.console
import rich.progress

from lowrank.formatting import format_number

SHARES = ("mfu", "waiting")


class Console:
    """A progress bar on a terminal; plain lines elsewhere, one for each line of metrics."""

    def __init__(self, steps: int, first: int):
        self.steps = steps
        self.bar = None
        if sys.stdout.isatty():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(highlight=False),
            )
            self.task = self.bar.add_task("starting", total=steps, completed=first)
            self.bar.start()

    def say(self, text: str):
        if self.bar:
            self.bar.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def step(self, step: int, scalars: dict[str, float] | None):
        """Show that `step` is done; `scalars` are given when they are due."""
        text = None
        if scalars is not None:
            named = {name.split("/")[1]: value for name, value in scalars.items()}
            text = "  ".join(
                f"{name} {f'{x:.1%}' if name in SHARES else format_number(x)}" for name, x in named.items()
            )
        if self.bar:
            self.bar.update(self.task, completed=step, **({} if text is None else {"description": text}))
        elif text is not None:
            print(f"step {step}/{self.steps}  {text}", flush=True)

    def close(self):
        if self.bar:
            self.bar.stop()
