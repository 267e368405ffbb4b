"""What a sweep shows while it trains."""

import io

import rich.console

from lowrank.sweeping.progress import MAX_ROWS, Progress


def progress_of(names):
    progress = Progress(names, steps=20, first=0)
    for i, name in enumerate(names):
        progress.train_losses[name] = 3.0 - i / 10
        progress.losses[name] = 2.0 - i / 10
    return progress


def test_elsewhere_than_on_a_terminal_lines_say_the_range_and_whose_it_is(capsys):
    progress = progress_of(["a", "b", "c"])
    progress.show_step(10, {})
    progress.show_step(11, None)
    progress.show_evaluation(10)
    progress.stopped["c"] = 12
    progress.show_step(20, {"train/tokens_per_second": 1234.5, "train/mfu": 0.25})
    progress.show_evaluation(20)
    assert capsys.readouterr().out.splitlines() == [
        "step 10/20  train loss 2.8 to 3",
        "step 10/20  eval loss 1.8 (c) to 2 (a)",
        "step 20/20  train loss 2.9 to 3  1,234 tokens/s  25.0% MFU",
        "step 20/20  eval loss 1.9 (b) to 2 (a)",
    ]


def test_the_table_has_the_best_first_and_the_diverged_last(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    names = [f"rank={i}" for i in range(MAX_ROWS + 3)]
    progress = progress_of(names)
    progress.stopped["rank=4"] = 7
    out = rich.console.Console(file=io.StringIO(), width=80)
    out.print(progress._make_table())
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert lines[0] == ["member", "eval", "loss", "train", "loss"]
    assert lines[1] == ["1", "rank=22", "-0.2000", "0.8000"] and lines[2][1] == "rank=21"
    assert lines[MAX_ROWS + 1] == ["and", "2", "more"]
    assert lines[MAX_ROWS + 2] == ["rank=4", "diverged", "at", "step", "7"]
    assert lines[MAX_ROWS + 3][:2] == ["step", "0/20"]
