"""Runs of several real processes on this machine: two with two CPU devices each, whose sums go through gloo.

What one process computes on four devices is the reference. The order of the data does not depend on how many processes there
are, so a run goes on with another number of them exactly where it was; sums over a mesh run in another order on another one.
"""

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import running
from running import steps

from lowrank.errors import UserError
from lowrank.parallel import distributed

ROOT = running.ROOT
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.lora.dropout=0")
LONG = (
    *MESH,
    "--config.train.steps=400",
    "--config.sample.every=0",
    "--config.eval.every=0",
    "--config.checkpoint.every=5",
)
STOPPED = (*LONG, "--config.eval.every=2", "--config.checkpoint.every=0")


def step_lines(text: str) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in text.splitlines() if line.startswith("step ")]


def start(tiny, workdir, *flags, **options):
    return running.start_processes(2, 2, tiny, f"--workdir={workdir}", "--coordinator_timeout=90", *flags, **options)


def finish(processes, timeout=240) -> list[running.Finished]:
    return [running.finish(process, timeout) for process in processes]


def wait_for_step(workdir: pathlib.Path, step: int, processes):
    """Until the run has written the metrics of `step`."""
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or all(line["step"] < step for line in running.lines(file)):
        assert time.monotonic() < deadline
        ended = [running.finish(process) for process in processes if process.poll() is not None]
        assert not ended, ended
        time.sleep(0.1)


def assert_close(workdir, other, step, lines=None):
    """The same run but for the order in which sums run: 1e-5 of each number and of each leaf's norm."""
    found, expected = (running.metrics(folder)[:lines] for folder in (workdir, other))
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, reference in zip(found, expected, strict=True):
        for name, value in reference.items():
            assert line[name] == pytest.approx(value, rel=1e-5), (name, line)
    found, expected = running.arrays(workdir, step, "adapter"), running.arrays(other, step, "adapter")
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        # AdamW's first steps are the gradient's sign: where that is near 0, its rounding moves an element by a whole step.
        assert np.linalg.norm(found[name] - leaf) <= 1e-4 * np.linalg.norm(leaf), name


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> tuple[pathlib.Path, int, str]:
    """A run of two processes on two devices each, stopped by SIGTERM to one of them -> its workdir, its last step, what
    process 0 said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    processes = start(tiny, workdir, *STOPPED, f"--config.data.cache={workdir.parent / 'tokens'}")
    wait_for_step(workdir, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish(processes)
    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert second.out == ""  # process 0 speaks for all
    assert len(list((workdir.parent / "tokens").iterdir())) == 1  # written together, once
    return workdir, steps(workdir)[-1], first.out


@pytest.fixture(scope="module")
def stopped_alone(tiny, stopped, tmp_path_factory) -> pathlib.Path:
    """The same run of one process on four devices, stopped after the same step."""
    _, last, _ = stopped
    workdir = tmp_path_factory.mktemp("alone") / "run"
    signals = lambda *_: contextlib.nullcontext(lambda step: "SIGTERM" if step == last else None)  # noqa: E731
    changes = {"lowrank.runs.train.stop_signals": signals}
    finished = running.run("train", tiny, f"--workdir={workdir}", *STOPPED, devices=4, changes=changes)
    assert finished.code == 75, finished.err
    return workdir


def test_sigterm_to_one_process_stops_all_at_one_step(stopped):
    _, last, said = stopped
    assert last >= 2
    assert f"stopped by SIGTERM after step {last}, which is saved; run the same command again" in said


def test_two_processes_compute_what_one_does(stopped, stopped_alone):
    workdir, last, said = stopped
    assert_close(workdir, stopped_alone, step=last)
    assert "processes  2, found through flags; process 0 is at localhost:" in said
    assert "mesh       data 2 x fsdp 2 x tensor 1 (4 x cpu)" in said


def test_two_processes_write_a_checkpoint_as_one_does(stopped, stopped_alone):
    """Whole, though each process has written the parts of its own devices; and none of it is of the base."""
    workdir, last, _ = stopped
    for item in ("adapter", "opt_state"):
        found, expected = running.arrays(workdir, last, item), running.arrays(stopped_alone, last, item)
        assert {name: leaf.shape for name, leaf in found.items()} == {
            name: leaf.shape for name, leaf in expected.items()
        }
    assert not [name for name in running.arrays(workdir, last, "adapter") if "kernel" in name or "embedding" in name]
    assert steps(workdir) == steps(stopped_alone)


# ---- Runs that end: samples and curves, too -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory) -> pathlib.Path:
    """Six steps of one process on four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finished = running.run("train", tiny, f"--workdir={workdir}", *MESH, devices=4)
    assert finished.code == 0, finished.err
    return workdir


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The same six steps of two processes on two devices each, started by the launch script; what they said."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    command = [sys.executable, ROOT / "launch" / "local_processes.py", "--processes=2", "--devices=2", "--", tiny]
    environment = running.environment(devices=1)  # the script says how many
    words = [*command, f"--workdir={workdir}", *MESH]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return workdir, finished.stdout


@pytest.mark.slow
def test_the_launch_script_trains_what_one_process_does(one_process, two_processes):
    workdir, said = two_processes
    assert_close(workdir, one_process, step=6)
    assert (workdir / "samples.jsonl").read_text() == (one_process / "samples.jsonl").read_text()
    assert "[0] processes  2, found through flags; process 0 is at localhost:" in said
    assert not [line for line in said.splitlines() if line.startswith("[1]")]  # process 0 speaks for all
    assert (workdir / "curves.png").stat().st_size > 10_000
    assert steps(workdir) == steps(one_process)


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit(tiny, two_processes, tmp_path):
    workdir = shutil.copytree(two_processes[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    first, second = finish(start(tiny, workdir, *MESH))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resumed from step 4" in first.out
    running.assert_same_run(workdir, two_processes[0])


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_on_another_mesh(tiny, one_process, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(one_process, tmp_path / name)
    more = (*MESH, "--config.train.steps=9")
    assert running.run("train", tiny, f"--workdir={tmp_path / 'one'}", *more, devices=4).code == 0
    fsdp = ("--config.mesh.data=1", "--config.mesh.fsdp=4")  # each process reads and holds half of the base
    first, second = finish(start(tiny, tmp_path / "two", *more, *fsdp))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resumed from step 6" in first.out and "mesh changed: the reduction order differs" in first.out
    assert_close(tmp_path / "two", tmp_path / "one", step=9)


@pytest.mark.slow
def test_a_run_of_two_processes_that_was_stopped_goes_on_to_the_bit(tiny, stopped, tmp_path):
    begun, step, _ = stopped
    whole, resumed = tmp_path / "whole", shutil.copytree(begun, tmp_path / "resumed")
    until = f"--config.train.steps={step + 6}"
    for workdir in (whole, resumed):
        finished = finish(start(tiny, workdir, *STOPPED, until))
        assert [process.code for process in finished] == [0, 0], finished
    assert f"resumed from step {step}" in finished[0].out
    running.assert_same_run(resumed, whole, step + 6)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_sigkill_to_one_process_ends_the_other_and_the_run_goes_on_with_another_number(tiny, tmp_path, killed):
    workdir = tmp_path / "run"
    processes = start(tiny, workdir, *LONG)
    wait_for_step(workdir, 6, processes)
    processes[killed].kill()
    began = time.monotonic()
    left = running.finish(processes[1 - killed], timeout=60)
    assert time.monotonic() - began < 60
    if killed:
        assert left.code == 75  # as after SIGTERM: the same command goes on
        last = left.err.strip().splitlines()[-1]
        assert last.startswith("error: process 1 of 2 (")
        assert "is gone without a word (killed, or its machine is)" in last
        assert "start the same command again, on all of them, to go on from the last checkpoint" in last
    else:  # JAX's runtime aborts it; launchers take that exit code, 134 in a shell, as 75
        assert left.code in (-signal.SIGABRT, 75)
    step = steps(workdir)[-1]
    assert step >= 5
    # One process on one device goes on, on another mesh: the same data, at the same place.
    flags = (*LONG[2:], f"--config.train.steps={step + 6}")
    finished = running.run("train", tiny, f"--workdir={workdir}", *flags)
    assert finished.code == 0, finished.err
    assert f"resumed from step {step}" in finished.out
    assert "mesh changed: the reduction order differs" in finished.out
    assert running.run("train", tiny, f"--workdir={tmp_path / 'alone'}", *flags).code == 0
    assert_close(workdir, tmp_path / "alone", step + 6)


def test_a_mistake_of_one_process_ends_all_with_its_message(tiny, tmp_path):
    own = {1: ("--config.data.train=nowhere.json",)}
    first, second = finish(start(tiny, tmp_path / "run", own=own))
    assert (first.code, second.code) == (1, 1)
    for finished in (first, second):
        (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: process 1 of 2 (")
        assert "data file nowhere.json cannot be read" in line
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_settings_and_code_are_refused(tiny, tmp_path):
    data = json.loads((pathlib.Path(tiny.split("=")[1]).parent / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(data[1:]))
    shutil.copytree(ROOT / "lowrank", tmp_path / "code" / "lowrank")
    with open(tmp_path / "code" / "lowrank" / "training" / "optimizer.py", "a") as file:
        file.write("\n# Edited on one host and not on the other.\n")
    own = {1: (f"--config.data.train={tmp_path / 'data.json'}", "--config.lora.rank=2")}
    first, second = finish(start(tiny, tmp_path / "run", own=own, code=(ROOT, tmp_path / "code")))
    assert (first.code, second.code) == (1, 1)
    for finished in (first, second):
        line = finished.err.strip().splitlines()[-1]
        assert "the processes do not run the same thing: config.lora.rank is 2 in process 1 of 2 (" in line
        assert "data.train is " in line
        assert "the code of lowrank is " in line
        assert "data.eval" not in line
        assert "give all of them the same command, code and files" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_for_ever(tiny, tmp_path, process):
    with socket.socket() as probe:  # bound but not listening: nobody else takes the port, nobody answers there
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        if process == 0:
            probe.close()
        flags = (f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}", "--coordinator_timeout=3")
        finished = running.finish(running.start("train", tiny, f"--workdir={tmp_path / 'run'}", *flags))
    assert finished.code == 75  # launchers start all again
    line = finished.err.strip().splitlines()[-1]
    assert line.startswith(f"error: process {process} of 2 (")
    if process:
        assert (
            f"waited 3 s: nobody answers at localhost:{port} (Connection refused): is process 0 running there" in line
        )
    else:
        assert f"waited 3 s: not all of the 2 processes came to localhost:{port}" in line


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--coordinator={address}: port \d+ cannot be opened here"):
            distributed.start(address, processes=2, process=0, timeout=3)


@pytest.mark.slow
def test_a_closed_pipe_ends_all(tiny, tmp_path):
    first, second = start(tiny, tmp_path / "run", *LONG)
    first.stdout.close()
    second.communicate(timeout=240)
    assert first.wait(60) == second.returncode == 1


@pytest.mark.slow
def test_the_launch_script_hands_a_stop_signal_on_to_a_training(tiny, tmp_path):
    command = [sys.executable, ROOT / "launch" / "local_processes.py", "--processes=2", "--devices=2", "--", tiny]
    words = [*command, f"--workdir={tmp_path / 'run'}", *LONG]
    script = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=running.environment(devices=1))
    wait_for_step(tmp_path / "run", 3, [script])
    script.send_signal(signal.SIGTERM)
    out, _ = script.communicate(timeout=120)
    assert script.returncode == 75, out
    assert f"[0] stopped by SIGTERM after step {steps(tmp_path / 'run')[-1]}, which is saved" in out
