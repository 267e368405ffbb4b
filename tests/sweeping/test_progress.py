"""What a sweep shows while it trains."""

import io

import rich.console

from lowrank.sweeping.progress import SHOWN, Progress


def board_of(names):
    board = Progress(names, steps=20, first=0)
    for i, name in enumerate(names):
        board.trained(name, 3.0 - i / 10)
        board.evaluated(name, 2.0 - i / 10)
    return board


def test_elsewhere_than_on_a_terminal_lines_say_the_range_and_whose_it_is(capsys):
    board = board_of(["a", "b", "c"])
    board.step(10, logs=True)
    board.step(11, logs=False)
    board.show_evaluation(10)
    board.diverged("c", 12)
    board.step(20, logs=True)
    board.show_evaluation(20)
    assert capsys.readouterr().out.splitlines() == [
        "step 10/20  train loss 2.8 to 3",
        "step 10/20  eval loss 1.8 (c) to 2 (a)",
        "step 20/20  train loss 2.9 to 3",
        "step 20/20  eval loss 1.9 (b) to 2 (a)",
    ]


def test_the_table_has_the_best_first_and_the_diverged_last(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    names = [f"rank={i}" for i in range(SHOWN + 3)]
    board = board_of(names)
    board.diverged("rank=4", 7)
    out = rich.console.Console(file=io.StringIO(), width=80)
    out.print(board._table())
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert lines[0] == ["member", "eval", "loss", "train", "loss"]
    assert lines[1] == ["1", "rank=22", "-0.2000", "0.8000"] and lines[2][1] == "rank=21"
    assert lines[SHOWN + 1] == ["and", "2", "more"]
    assert lines[SHOWN + 2] == ["rank=4", "diverged", "at", "step", "7"]
    assert lines[SHOWN + 3][:2] == ["step", "0/20"]
