"""What a sweep shows while it trains: on a terminal a live table of its members, elsewhere a line where one is due."""

import math
import sys

import rich.console
import rich.live
import rich.progress
import rich.table

from lowrank.formatting import format_number

SHOWN = 20  # members in the table, the best ones


class Progress:
    """The members' losses, best first. A context manager; what is said goes above the table."""

    def __init__(self, names: list[str], steps: int, first: int):
        self.steps = steps
        self.losses: dict[str, float] = {}  # of the last evaluation
        self.train_losses: dict[str, float] = {}
        self.stopped: dict[str, int] = {}
        self.names = names
        self.live = None
        if sys.stdout.isatty():
            console = rich.console.Console(highlight=False)
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=steps, completed=first)
            self.live = rich.live.Live(console=console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def say(self, text: str):
        if self.live:
            self.live.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def trained(self, name: str, loss: float):
        self.train_losses[name] = loss

    def evaluated(self, name: str, loss: float):
        self.losses[name] = loss

    def diverged(self, name: str, step: int):
        self.stopped[name] = step

    def step(self, step: int, logs: bool):
        """Show that `step` is done; `logs`: its losses are due."""
        if self.live:
            self.bar.update(self.task, completed=step)
        elif logs and (losses := self._going_on(self.train_losses)):
            print(
                f"step {step}/{self.steps}  train loss {format_number(min(losses))} to {format_number(max(losses))}",
                flush=True,
            )

    def show_evaluation(self, step: int):
        ranked = self.ranked()
        if not self.live and ranked:
            best, worst = ranked[0], ranked[-1]
            text = f"step {step}/{self.steps}  eval loss {format_number(self.losses[best])} ({best})"
            print(text + (f" to {format_number(self.losses[worst])} ({worst})" if worst != best else ""), flush=True)

    def ranked(self) -> list[str]:
        """Members that go on and have been evaluated, best first."""
        return sorted((name for name in self.losses if name not in self.stopped), key=self.losses.get)

    def _going_on(self, losses: dict[str, float]) -> list[float]:
        return [loss for name, loss in losses.items() if name not in self.stopped]

    def _table(self):
        table = rich.table.Table("", "member", "eval loss", "train loss", box=None, pad_edge=False)
        order = self.ranked()
        order += [name for name in self.names if name not in self.losses and name not in self.stopped]
        for place, name in enumerate(order[:SHOWN], start=1):
            values = (losses.get(name, math.nan) for losses in (self.losses, self.train_losses))
            table.add_row(str(place), name, *("" if math.isnan(value) else f"{value:.4f}" for value in values))
        if len(order) > SHOWN:
            table.add_row("", f"and {len(order) - SHOWN} more")
        for name, step in self.stopped.items():
            table.add_row("", name, f"diverged at step {step}")
        return rich.console.Group(table, self.bar)
