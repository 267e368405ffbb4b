"""What a sweep shows while it trains: a live table of its members on a terminal, otherwise a line for each logged step."""

import contextlib

import rich.console
import rich.live
import rich.progress
import rich.table

from lowrank.formatting import format_number
from lowrank.runs.console import is_live

MAX_ROWS = 20  # members in the live table, the best ones


class Progress:
    """The members' losses, the best first. While `live`, a context manager, is open, `say` prints above the table."""

    def __init__(self, names: list[str], steps: int, first: int):
        self.names, self.steps = names, steps
        self.losses: dict[str, float] = {}  # of the last evaluation
        self.train_losses: dict[str, float] = {}
        self.stopped: dict[str, int] = {}  # diverged member -> the step whose loss was not finite
        self.console = rich.console.Console(highlight=False, force_jupyter=False)
        columns = (rich.progress.BarColumn(), rich.progress.TimeRemainingColumn())
        self.bar = rich.progress.Progress("step {task.completed}/{task.total}", *columns, console=self.console)
        self.task = self.bar.add_task("", total=steps, completed=first)
        self.is_live = is_live()
        live = rich.live.Live(console=self.console, get_renderable=self._make_table, refresh_per_second=2)
        self.live: contextlib.AbstractContextManager = live if self.is_live else contextlib.nullcontext()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def show_step(self, step: int, rates: dict[str, float] | None) -> None:
        """Show that `step` is done; `rates`, its speeds, where its losses are logged."""
        self.bar.update(self.task, completed=step)
        losses = [loss for name, loss in self.train_losses.items() if name not in self.stopped]
        if not self.is_live and rates is not None and losses:
            line = f"step {step}/{self.steps}  train loss {format_number(min(losses))} to {format_number(max(losses))}"
            speeds = (("train/tokens_per_second", ",.0f", " tokens/s"), ("train/mfu", ".1%", " MFU"))
            self.say(line + "".join(f"  {rates[key]:{form}}{unit}" for key, form, unit in speeds if key in rates))

    def show_evaluation(self, step: int) -> None:
        ranked = self._rank_members()
        if not self.is_live and ranked:
            ends = dict.fromkeys((ranked[0], ranked[-1]))
            shown = " to ".join(f"{format_number(self.losses[name])} ({name})" for name in ends)
            self.say(f"step {step}/{self.steps}  eval loss {shown}")

    def _rank_members(self) -> list[str]:
        """Members that were evaluated and did not diverge, the best first."""
        return sorted((name for name in self.losses if name not in self.stopped), key=lambda name: self.losses[name])

    def _make_table(self) -> rich.console.Group:
        table = rich.table.Table("", "member", "eval loss", "train loss", box=None, pad_edge=False)
        order = self._rank_members()
        order += [name for name in self.names if name not in self.losses and name not in self.stopped]
        for place, name in enumerate(order[:MAX_ROWS], start=1):
            cells = (f"{losses[name]:.4f}" if name in losses else "" for losses in (self.losses, self.train_losses))
            table.add_row(str(place), name, *cells)
        if len(order) > MAX_ROWS:
            table.add_row("", f"and {len(order) - MAX_ROWS} more")
        for name, step in self.stopped.items():
            table.add_row("", name, f"diverged at step {step}")
        return rich.console.Group(table, self.bar)
