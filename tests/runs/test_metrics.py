"""The log: whole lines, forgotten steps, and the optional writers."""

import importlib.util
import json
import sys

import pytest

from lowrank import formatting
from lowrank.config import Config, LogConfig
from lowrank.errors import UserError
from lowrank.files import lines as lines_lib
from lowrank.runs import curves
from lowrank.runs.metrics import Metrics


def test_a_torn_last_line_is_left_out_and_later_steps_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        lines_lib.append_line(file, {"step": step, "train/loss": 0.5 * step})
    with open(file, "a") as stream:
        stream.write('{"step": 4, "tra')
    assert [line["step"] for line in lines_lib.read_lines(file)] == [1, 2, 3]
    lines_lib.forget_after(file, 2)
    assert file.read_text() == '{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 1.0}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_every_writer_gets_the_scalars(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    begun = []

    class Wandb:  # stands where the library would: it needs an account
        def init(self, **options):
            begun.append(options)
            return self

        def log(self, scalars, step):
            self.logged = (scalars, step)

        def finish(self):
            self.finished = True

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first in (0, 7):  # begun, and resumed
        writer = Metrics(tmp_path, Config(log=LogConfig(tensorboard=True, wandb="project")), first)
        writer.write(first + 1, {"train/loss": 2.5})
        writer.close()
        assert wandb.logged == ({"train/loss": 2.5}, first + 1)
        assert wandb.finished
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["project"] == "project"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 8]
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in events  # a file is named by its second, so there may be one or two of them here


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_writer_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config.log.wandb needs wandb; pip install"):
        Metrics(tmp_path, Config(log=LogConfig(wandb="project")), 0)


@pytest.mark.parametrize(
    ("x", "text"), [(3, "3"), (1234567, "1,234,567"), (0.0002, "0.0002"), (2.34567, "2.346"), (1234.5, "1,234")]
)
def test_numbers_for_people(x, text):
    assert formatting.format_number(x) == text


def test_curves_are_drawn_from_whatever_is_there(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines_lib.append_line(file, {"step": 0, "eval/loss": 2.0})
    curves.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
