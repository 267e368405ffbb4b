"""`lowrank.runs.train` as a notebook calls it: no flags, no process exit, Ctrl-C saves, and no handler is left behind."""

import dataclasses
import functools
import os
import signal
import threading

import jax
import pytest
import running

from lowrank import runs
from lowrank.cli import config_file
from lowrank.config import Config, TrainConfig
from lowrank.errors import UserError
from lowrank.parallel import mesh

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def config(tiny, monkeypatch):
    one_device = functools.partial(mesh.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(mesh, "make_mesh", one_device)
    return config_file.read(tiny.removeprefix("--config="), [])


def test_an_interrupted_run_saves_leaves_no_handler_and_resumes_to_the_bit(config, trained, tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    make = runs.train.__globals__["abstract_step"]

    def interrupted(*arguments):
        setup = make(*arguments)
        calls = []

        def step(state, frozen, batch):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return setup.function(state, frozen, batch)

        return dataclasses.replace(setup, function=running.Uncompiled(step))

    with monkeypatch.context() as patch:
        patch.setitem(runs.train.__globals__, "abstract_step", interrupted)
        stopped = runs.train(config, tmp_path / "run")
    assert (stopped.stopped_by, stopped.step, stopped.checkpoint.is_dir()) == ("SIGINT", 3, True)
    assert list(stopped.losses) == [1, 2, 3] and list(stopped.eval_losses) == [0, 3]
    assert [signal.getsignal(number) for number in SIGNALS] == handlers

    result = runs.train(config, tmp_path / "run")
    assert (result.stopped_by, result.step) == (None, 6)
    running.assert_same_run(tmp_path / "run", trained)
    adapter = result.adapter
    assert adapter.step == 6 and adapter.lora == config.lora
    assert runs.train(config, tmp_path / "run").losses == result.losses  # complete: nothing is trained


def test_a_run_in_another_thread_needs_no_signals(config, trained, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(runs.train(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].step == 6
    running.assert_same_run(tmp_path / "run", trained)


def test_a_config_built_in_python_is_checked(tmp_path):
    wrong = dataclasses.replace(Config(), train=TrainConfig(steps=0), dtype="float8")
    with pytest.raises(UserError, match=r"config.train.steps=0 must be at least 1.*config.dtype=float8 must be one of"):
        runs.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
