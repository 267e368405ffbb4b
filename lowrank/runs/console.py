"""What a run shows while it trains: a progress bar on a terminal, elsewhere a plain line for each line of metrics."""

import sys

import rich.console
import rich.progress

from lowrank.formatting import format_number

SHARES = ("mfu", "waiting")  # shown in percent


class Console:
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

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def show_step(self, step: int, scalars: dict[str, float] | None) -> None:
        """Show that `step` is done; `scalars` are given where a line is due."""
        named = {name.split("/")[1]: x for name, x in (scalars or {}).items()}
        text = "  ".join(f"{name} {f'{x:.1%}' if name in SHARES else format_number(x)}" for name, x in named.items())
        if self.bar:
            self.bar.update(self.task, completed=step, description=text or None)
        elif text:
            print(f"step {step}/{self.steps}  {text}", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
