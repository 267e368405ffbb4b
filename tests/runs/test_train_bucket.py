"""Runs whose workdir lies in a bucket: the same to the bit as on a disk, stopped anywhere, and alone in their workdir."""

import datetime
import importlib.util
import json
import pathlib
import re
import signal
import threading
import time
from typing import NamedTuple

import fake_gcs
import jax
import numpy as np
import pytest
import running
from running import assert_same_run

from lowrank.files import bucket_lock, paths
from lowrank.inference import load
from lowrank.runs.adapter import read_adapter

WORKDIR = "gs://bucket/runs/tiny"
RUN = WORKDIR.removeprefix("gs://")
LOCK = f"{RUN}/.lock"
NOBODY = {"id": "other", "host": "elsewhere", "process": "7", "machine": "another"}


def train(tiny, *overrides, **options):
    return running.run("train", tiny, f"--workdir={WORKDIR}", *overrides, **options)


def steps(bucket) -> list[int]:
    """Of the checkpoints that are whole."""
    found = (re.fullmatch(r"checkpoints/(\d+)/commit_success.txt", name) for name in bucket.files(RUN))
    return sorted(int(match[1]) for match in found if match)


def fetched(bucket, folder):
    """What lies in the bucket, as a folder."""
    for name, content in bucket.files(RUN).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class FinishedRun(NamedTuple):
    files: dict[str, bytes]  # its objects
    writes: dict[str, list]  # what was written when, by object
    said: str


@pytest.fixture(scope="module")
def finished_run(tiny, trained, demo_base) -> FinishedRun:
    """The command of a TPU VM, of six steps: base, data and workdir in a bucket, so that nothing of the run lies on its disk."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed")
    data = json.loads((trained / "config.json").read_text())["config"]["data"]["train"]
    with fake_gcs.serving() as bucket:
        bucket.put_folder("bucket/base", demo_base)
        bucket.put("bucket/data.json", pathlib.Path(data).read_bytes())
        finished = train(tiny, "--config.base=gs://bucket/base", "--config.data.train=gs://bucket/data.json")
        assert finished.code == 0, finished.err
        return FinishedRun(bucket.files(RUN), bucket.writes, finished.out)


@pytest.fixture
def run(bucket, finished_run):
    """That run, once more in a bucket."""
    for name, content in finished_run.files.items():
        bucket.put(f"{RUN}/{name}", content)
    return bucket


def without(bucket, *beginnings):
    """Take objects away that would not be there yet."""
    for name in [*bucket.objects]:
        if name.startswith(tuple(f"{RUN}/{beginning}" for beginning in beginnings)):
            del bucket.objects[name]


# ---- The same run ------------------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_the_run_on_a_disk(run, trained, tmp_path, finished_run):
    assert_same_run(fetched(run, tmp_path), trained)
    assert steps(run) == [3, 4, 6]
    files = run.files(RUN)
    assert files["curves.png"].startswith(b"\x89PNG") and ".lock" not in files
    record, expected = (json.loads(text) for text in (files["config.json"], (trained / "config.json").read_text()))
    expected["config"]["base"], expected["config"]["data"]["train"] = "gs://bucket/base", "gs://bucket/data.json"
    assert (record["config"], record["identity"]) == (expected["config"], expected["identity"])
    assert re.search(rf"adapter +{WORKDIR} \(as --adapter takes it; checkpoints of \d+\.\d [KM]B\)", finished_run.said)


def test_resumed_equals_uninterrupted(run, tiny, trained, tmp_path):
    without(run, "checkpoints/6/")
    finished = train(tiny)
    assert finished.code == 0 and "resumed from step 4" in finished.out
    assert_same_run(fetched(run, tmp_path), trained)


def test_killed_while_saving_equals_uninterrupted(run, tiny, trained, tmp_path):
    without(run, "checkpoints/6/commit_success.txt", "checkpoints/6/opt_state/")
    finished = train(tiny)
    assert finished.code == 0 and "resumed from step 4" in finished.out
    assert_same_run(fetched(run, tmp_path), trained)
    assert steps(run) == [3, 4, 6]


def test_killed_while_removing_an_old_checkpoint_equals_uninterrupted(run, tiny, trained, tmp_path):
    without(run, "checkpoints/6/", "checkpoints/3/adapter", "checkpoints/3/_")
    assert train(tiny).code == 0
    assert_same_run(fetched(run, tmp_path), trained)


@pytest.mark.slow
def test_killed_by_sigkill_equals_uninterrupted(bucket, tiny, tmp_path):
    process = running.start("train", tiny, f"--workdir={WORKDIR}", "--config.train.steps=1000")
    deadline = time.monotonic() + 120
    while not steps(bucket):
        assert process.poll() is None, running.finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    assert running.finish(process).code == -signal.SIGKILL
    assert LOCK in bucket.objects  # the process that held it is gone, which is seen at once on this machine
    last = max(steps(bucket)) + 6
    finished = train(tiny, f"--config.train.steps={last}")
    assert finished.code == 0 and "resumed from step" in finished.out, finished
    assert "was in use by" not in finished.out
    whole = tmp_path / "whole"
    assert running.run("train", tiny, f"--workdir={whole}", f"--config.train.steps={last}").code == 0
    assert_same_run(fetched(bucket, tmp_path / "run"), whole, last)


def test_a_complete_run_says_so(run, tiny):
    finished = train(tiny)
    assert (finished.code, f"the run in {WORKDIR} is complete at step 6" in finished.out) == (0, True)


def test_a_run_that_was_copied_from_a_disk_goes_on_and_is_read(bucket, tiny, trained, tmp_path):
    """In a bucket Orbax removes what has no commit_success.txt; it writes one on disks, too."""
    bucket.put_folder(RUN, trained)
    without(bucket, "checkpoints/6/")
    assert read_adapter(WORKDIR).step == 4
    finished = train(tiny)
    assert finished.code == 0 and "resumed from step 4" in finished.out, finished
    assert_same_run(fetched(bucket, tmp_path / "run"), trained)


# ---- Alone -------------------------------------------------------------------------------------------------------------


def held(bucket, seconds_ago: float, **changes):
    """Another process's lock, touched so long ago."""
    bucket.put(LOCK, b"", NOBODY | changes)
    bucket.objects[LOCK]["updated"] -= datetime.timedelta(seconds=seconds_ago)


def test_a_second_process_in_the_same_workdir_is_refused(run, tiny, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.2)
    monkeypatch.setattr(bucket_lock, "LOOK", 0.5)
    before = run.files(RUN)
    with bucket_lock.locked(paths.path(f"gs://{LOCK}"), WORKDIR):
        finished = train(tiny)
    assert finished.code == 1
    assert re.fullmatch(
        rf"error: workdir {WORKDIR} is in use by process \d+ on .*; wait for it or choose another\n", finished.err
    )
    assert run.files(RUN) == before


def test_of_two_that_come_at_once_one_gets_in(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    monkeypatch.setattr(bucket_lock, "LOOK", 0.2)
    held(bucket, bucket_lock.STALE + 1)
    inside, refused, done = [], [], threading.Event()

    def enter(number):
        try:
            with bucket_lock.locked(paths.path(f"gs://{LOCK}"), WORKDIR):
                inside.append(number)
                done.wait(20)
        except Exception as error:
            refused.append(str(error))
            done.set()

    threads = [threading.Thread(target=enter, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(inside) == 1 and "in use by process" in refused[0] and len(refused) == 1
    assert LOCK not in bucket.objects


@pytest.mark.parametrize("clock", [0, 3600, -3600])
def test_a_lock_that_is_not_touched_is_nobodys(bucket, clock, capsys, monkeypatch):
    """By the bucket's clock: this machine's may be wrong."""
    monkeypatch.setattr(bucket_lock, "LOOK", 0.2)
    bucket.ahead = clock
    held(bucket, bucket_lock.STALE - 5)
    began = time.monotonic()
    with bucket_lock.locked(paths.path(f"gs://{LOCK}"), WORKDIR):
        assert bucket.objects[LOCK]["metadata"]["id"] != "other"
        assert time.monotonic() - began < 20
    assert re.search(r"was in use by process 7 on elsewhere 5\d s ago; looking for up to \d s", capsys.readouterr().out)
    assert LOCK not in bucket.objects


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(bucket, capsys):
    gone = running.start("train")
    gone.kill()
    running.finish(gone)
    held(bucket, 0, process=str(gone.pid), machine=bucket_lock._machine())
    with bucket_lock.locked(paths.path(f"gs://{LOCK}"), WORKDIR):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["taken over", "out of reach"])
def test_a_process_that_has_lost_its_lock_ends_at_once(bucket, monkeypatch, how):
    ended = threading.Event()
    said = []
    monkeypatch.setattr(bucket_lock, "_exit", lambda *what: (said.append(what), ended.set()))
    for name, value in {"BEAT": 0.1, "GIVE_UP": 0.5}.items():
        monkeypatch.setattr(bucket_lock, name, value)
    with bucket_lock.locked(paths.path(f"gs://{LOCK}"), WORKDIR):
        if how == "taken over":
            held(bucket, 0)
        else:
            bucket.refuse = lambda method, path: (403, "no longer") if method == "PATCH" else None
        assert ended.wait(10)
        bucket.refuse = None
    code, message = {
        "taken over": (1, "was taken over by a process that took this one for dead"),
        "out of reach": (75, "(gs://bucket/runs/tiny/.lock: Google"),  # the same command again goes on
    }[how]
    assert said[0][0] == code and message in said[0][1]
    assert how == "out of reach" or bucket.objects[LOCK]["metadata"]["id"] == "other"  # and is left to who has it


def test_a_folder_that_is_somebody_elses_is_left_alone(bucket, tiny):
    bucket.put(f"{RUN}/notes.txt", b"mine")
    finished = train(tiny)
    assert (
        finished.err
        == f"error: workdir {WORKDIR} is not empty and is no run's (no config.json); choose another --workdir\n"
    )
    assert bucket.files(RUN) == {"notes.txt": b"mine"}


# ---- Lines -------------------------------------------------------------------------------------------------------------


def test_lines_are_written_together_and_before_every_checkpoint(finished_run):
    """An object can be replaced about once a second, so not for each line; but no checkpoint is ahead of its lines."""
    assert len(finished_run.files["metrics.jsonl"].splitlines()) == 9
    written = finished_run.writes[f"{RUN}/metrics.jsonl"]
    assert len(written) <= 6
    for step in (2, 3, 4, 6):
        [(saved, _)] = finished_run.writes[f"{RUN}/checkpoints/{step}/commit_success.txt"]
        before = [content for generation, content in written if generation < saved]
        assert f'{{"step": {step}, "train/loss"'.encode() in before[-1]


# ---- Read from there ---------------------------------------------------------------------------------------------------


def test_an_adapter_in_a_bucket_is_read_as_on_a_disk(run, trained, tmp_path, demo_base):
    there, here = (load(demo_base, adapter).variables["lora"] for adapter in (WORKDIR, trained))
    assert jax.tree.all(jax.tree.map(np.array_equal, there, here))
    words = (f"--workdir={WORKDIR}", f"--base={demo_base}", "--format=peft", f"--to={tmp_path / 'peft'}")
    exported = running.run("export", *words)
    assert exported.code == 0, exported.err
    run.put_folder("bucket/peft", tmp_path / "peft")
    from_peft = load(demo_base, "gs://bucket/peft").variables["lora"]
    assert jax.tree.all(jax.tree.map(np.array_equal, from_peft, here))


@pytest.mark.slow
def test_commands_read_an_adapter_in_a_bucket_as_on_a_disk(run, trained, tmp_path, demo_base):
    base = f"--base={demo_base}"
    ask = ("generate", base, "--prompt=Name a colour.", "--max_new_tokens=8")
    here, there = (running.run(*ask, f"--adapter={adapter}") for adapter in (trained, WORKDIR))
    assert (there.code, there.out) == (0, here.out), there.err
    data = json.loads((trained / "config.json").read_text())["config"]["data"]["train"]
    measure = ("evaluate", base, f"--data={data}")
    here, there = (running.run(*measure, f"--adapter={adapter}") for adapter in (trained, WORKDIR))
    assert there.code == 0 and re.findall(r"loss [\d.]+", here.out) == re.findall(r"loss [\d.]+", there.out), there.err
    analysed = running.run("analyze", base, f"--adapter={WORKDIR}", f"--to={tmp_path / 'analysis'}")
    assert analysed.code == 0, analysed.err
    exported = running.run("export", f"--workdir={WORKDIR}", base, "--format=peft", f"--to={tmp_path / 'peft'}")
    assert exported.code == 0, exported.err
    run.put_folder("bucket/peft", tmp_path / "peft")
    from_peft = running.run(*ask, "--adapter=gs://bucket/peft", "--format=completion")
    assert from_peft.code == 0, from_peft.err


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run, demo_base):
    run.refuse = lambda method, path: (403, "me has no access") if "/ocdbt.process_0/" in path else None
    base = f"--base={demo_base}"
    finished = running.run("generate", base, "--prompt=a", f"--adapter={WORKDIR}")
    assert finished.code == 1 and len(finished.err.splitlines()) == 1
    assert f"checkpoint {WORKDIR}/checkpoints/6 cannot be read: Google Cloud Storage does not allow it" in finished.err
    assert "remove" not in finished.err


@pytest.mark.parametrize(
    "words",
    [
        ("export", f"--workdir={WORKDIR}", "--format=peft", "--to=gs://bucket/out"),
        ("convert", "--from=configs/demo/base", "--to=gs://bucket/out"),
        ("evaluate", "--base=configs/demo/base", "--data=x.json", "--to=gs://bucket/out"),
        ("sweep", "--config=configs/rank_sweep.py", "--workdir=gs://bucket/out"),
    ],
)
def test_what_is_written_on_this_machine_only_says_so(words):
    finished = running.run(*words)
    assert finished.code == 1 and "gs://bucket/out: this is written on this machine only" in finished.err


def test_tensorboard_is_refused_before_anything_is_read(tiny):
    finished = train(tiny, "--config.log.tensorboard=True", "--config.base=nowhere")
    assert finished.code == 1 and finished.err.startswith(
        "error: config.log.tensorboard appends to its files, which a bucket"
    )


# ---- Several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_a_base_and_a_workdir_in_a_bucket(bucket, tiny, tmp_path, demo_base):
    """Bitwise as the same two processes on a disk; the base is read by ranges in both."""
    bucket.put_folder("bucket/base", demo_base)
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--coordinator_timeout=90")
    there = running.start_processes(2, 2, tiny, f"--workdir={WORKDIR}", "--config.base=gs://bucket/base", *mesh)
    for process in there:
        finished = running.finish(process, 240)
        assert finished.code == 0, finished.err
    here = running.start_processes(2, 2, tiny, f"--workdir={tmp_path / 'disk'}", *mesh)
    for process in here:
        assert running.finish(process, 240).code == 0
    assert_same_run(fetched(bucket, tmp_path / "bucket"), tmp_path / "disk")
    assert LOCK not in bucket.objects
