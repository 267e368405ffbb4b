"""The progress line of a run: what fits on a terminal, and plain lines where nothing can be drawn anew."""

import io
import re

import pytest
import rich
import rich.console

from lowrank.runs import console

SCALARS = {"train/loss": 0.64571, "train/grad_norm": 3.724, "train/learning_rate": 2e-4, "train/mfu": 0.25}


@pytest.mark.parametrize(
    ("width", "bar", "shown"),
    [
        (40, False, "loss 0.6457"),
        (80, True, "loss 0.6457  grad_norm 3.724"),
        (200, True, "loss 0.6457  grad_norm 3.724  learning_rate 0.0002  mfu 25.0%"),
    ],
)
def test_the_line_has_step_time_and_loss_and_more_as_there_is_room(monkeypatch, width, bar, shown):
    terminal = rich.console.Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    monkeypatch.setattr(rich, "_console", terminal)
    monkeypatch.setattr(console, "is_live", lambda: True)
    with console.progress(20_000, 0) as show:
        for step in (1, 2):
            show(step, SCALARS)
    last = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.file.getvalue()).strip())[-1]
    time = r"[-\d]+:[-\d]+:[-\d]+"
    assert re.fullmatch(rf"step 2/20000 {'[━╸╺ ]{20} ' * bar}{time} {re.escape(shown)}", last.strip()), last
    assert len(last) <= width


@pytest.mark.parametrize(
    ("terminal", "term", "live"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_plain_lines_where_no_line_can_be_drawn_anew(monkeypatch, capsys, terminal, term, live):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", term)
    assert console.is_live() == live
    if not live:
        with console.progress(4, 0) as show:
            show(1, SCALARS)
            show(2, None)
        assert capsys.readouterr().out == "step 1/4  loss 0.6457  grad_norm 3.724  learning_rate 0.0002  mfu 25.0%\n"


class Stream(io.StringIO):
    """A stream without a file below it, as a notebook's; on demand it says that it is a terminal."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_counting_draws_on_a_terminal_and_what_is_printed_goes_to_stdout_alone(monkeypatch):
    out, err = Stream(), Stream(terminal=True)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with console.counting("examples", 52_002) as show:
        show(10.4)
        print("an answer")
        show(52_002)
    assert out.getvalue() == "an answer\n"
    drawn = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", err.getvalue()))
    assert any(re.fullmatch(r"examples 52,002/52,002 ━{20} [-\d:]+", line.strip()) for line in drawn), drawn
    assert max(map(len, drawn)) <= 80


def test_in_a_notebook_there_are_plain_lines(monkeypatch):
    """`get_ipython` is how rich knows one; its streams have no file and are no terminals."""
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(rich, "_console", None)
    out, err = Stream(), Stream()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(console, "PAUSE", 0.0)
    assert rich.get_console().is_jupyter
    with console.progress(4, 0) as show:
        show(1, {"train/loss": 0.64571})
        show(2, None)
    with console.counting("prompts", 1000) as show:
        show(250)
    assert out.getvalue() == "step 1/4  loss 0.6457\n"
    assert re.fullmatch(r"prompts 250/1,000  0:00:00 left\n", err.getvalue())
