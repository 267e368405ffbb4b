"""A workdir: that several hosts see the same folder, and what a resumed run may change, without running it."""

import dataclasses
import errno
import importlib
import json
import os
import subprocess
import sys
import types

import pytest

from lowrank import config as config_lib
from lowrank.config import Config, OptimConfig, TrainConfig
from lowrank.errors import UserError
from lowrank.runs import workdir as workdir_lib
from lowrank.training.optimizer import learning_rate_schedule


def test_a_process_that_sees_another_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lib, "NFS_SECONDS", 1)
    with pytest.raises(UserError, match="is not the folder of that name of process 0; checkpoints need one that all"):
        workdir_lib.refuse_other_folder(tmp_path, at=5.0)  # nothing there
    (tmp_path / "config.json").write_text(json.dumps({"at": 4.0, "config": {}, "identity": {}}))
    with pytest.raises(UserError, match="is not the folder"):
        workdir_lib.refuse_other_folder(tmp_path, at=5.0)  # an earlier run's, of a folder that was copied
    workdir_lib.refuse_other_folder(tmp_path, at=4.0)


def test_what_the_out_of_memory_message_names_may_change_and_evaluation_too():
    config = Config(train=TrainConfig(steps=4))
    identity = {"base": "1", "data.train": "2", "data.eval": "3"}
    record = json.loads(json.dumps({"config": config_lib.to_dict(config), "identity": identity}))
    train = dataclasses.replace(config.train, microbatches=2)
    sample = dataclasses.replace(config.sample, prompts=("Another",), max_new_tokens=9)
    other = dataclasses.replace(config, train=train, sample=sample, remat="full", attention="xla")
    identity |= {"data.eval": "another file's"}
    assert workdir_lib.resume_differences(record, other, identity) == []
    assert workdir_lib.resume_differences(record, config, identity, free_content=()) == ["data.eval has other content"]
    other = dataclasses.replace(other, seed=1)
    assert workdir_lib.resume_differences(record, other, identity) == ["config.seed was 0 and is 1"]


def resumed(before: Config, now: Config, step: int, eval_hashes=(None, None)) -> list[str]:
    """What a run says that resumes from this step."""
    schedule = learning_rate_schedule(now.optim, now.train.steps)
    inputs, setup = types.SimpleNamespace(rows=0, steps=now.train.steps), types.SimpleNamespace(schedule=schedule)
    identities = [{"data.eval": each} for each in eval_hashes]
    run = types.SimpleNamespace(config=now, inputs=inputs, setup=setup, identity=identities[1])
    meta = json.loads(json.dumps({"config": config_lib.to_dict(before), "identity": identities[0]}))
    return importlib.import_module("lowrank.runs.train")._said_on_resume(run, step, meta)


def test_a_schedule_that_jumps_on_resume_is_warned_of_once(recwarn):
    cosine = OptimConfig(learning_rate=2e-4, schedule="cosine")
    before, now = (Config(train=TrainConfig(steps=steps), optim=cosine) for steps in (4, 8))
    assert resumed(before, before, 3) == [] and not recwarn.list
    assert resumed(before, now, 4) == []
    (warning,) = recwarn.list
    assert str(warning.message) == (
        "config.optim.schedule=cosine now ends at step 8: the learning rate goes from 2.93e-05 in step 4 to 0.0001 in step 5, "
        "where it was to be 0"
    )
    constant = (Config(train=TrainConfig(steps=steps)) for steps in (4, 8))
    assert resumed(*constant, 4) == [] and len(recwarn.list) == 1


def test_a_step_that_is_computed_otherwise_is_said_to_be_no_longer_bitwise():
    before = Config(train=TrainConfig(steps=4))
    train = dataclasses.replace(before.train, microbatches=2)
    now = dataclasses.replace(before, train=train, remat="full", mesh=dataclasses.replace(before.mesh, fsdp=2, data=1))
    said = resumed(before, now, 2, ("one", "another"))
    assert said == [
        "mesh, remat, train.microbatches changed: the reduction order differs, so the run is no longer bitwise reproducible",
        "data.eval has other content: losses up to step 2 were evaluated on other examples than from here on",
    ]


def test_a_file_stands_for_the_lock_where_the_file_system_has_no_flock(tmp_path, monkeypatch, capsys):
    def no_flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(workdir_lib.fcntl, "flock", no_flock)
    file, held = tmp_path / "config.json", tmp_path / ".lock.held"
    lock = lambda: workdir_lib.lock_workdir(tmp_path, file, "run")  # noqa: E731
    with lock():
        assert "has no flock (No locks available); while the run lasts, the file .lock.held" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"is in use by another process, as .*\.lock\.held says"), lock():
            pass
        holder = json.loads(held.read_text())
    assert not held.exists()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held.write_text(json.dumps(holder | {"process": str(ended.pid)}))  # of a process of this machine that was killed
    with lock():
        assert json.loads(held.read_text()) == holder
    held.write_text(json.dumps(holder | {"machine": "another"}))
    with pytest.raises(UserError, match="is in use"), lock():
        pass
