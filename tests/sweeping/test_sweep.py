"""The sweep command: members that equal runs alone, over one base in one program; what it keeps; and how it goes on."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import running
from running import TRAIN_KEYS, arrays, kept_arrays, metrics, steps

from lowrank.adapters.config import TARGETS
from lowrank.sweeping import group, members, wave
from lowrank.training.partition import named_leaves
from lowrank.weights.load import load_params

GRID = ("--config.sweep.lora.rank=(1,4)", "--config.sweep.train.mode=lora,full", "--config.sweep.seed=(0,1)")
ALL_TARGETS = f"--config.lora.targets={','.join(TARGETS)}"
# Without the full fine-tuning; the members' names then leave the mode out.
ADAPTERS = (GRID[0], GRID[2])
NAMES = ["rank=1,mode=lora,seed=0", "rank=1,mode=lora,seed=1", "mode=full", "rank=4,mode=lora,seed=0", "rank=4,mode=lora,seed=1"]  # fmt: skip


# A group of four members of rank 4: its program is that of ADAPTERS. Half of the members diverge at the second step.
RATES = ("--config.sweep.optim.learning_rate=(1e-3,1e30)", GRID[2])
UNCLIPPED = ("--config.sample.every=0", "--config.optim.clip_norm=0", "--config.optim.warmup_steps=0")


def sweep(tiny, workdir, *overrides, changes=None, **options):
    """Without the picture, which takes a second and is tested elsewhere."""
    without = {"lowrank.sweeping.picture.write_picture": lambda *_: None}
    return running.run("sweep", tiny, f"--workdir={workdir}", *overrides, changes=without | (changes or {}), **options)


def member(workdir, name) -> pathlib.Path:
    return workdir / "members" / name


def assert_same_sweep(workdir, other, names=NAMES, step=6):
    """To the bit: what the members wrote, what they became, and the tables."""
    for name in names:
        one, expected = member(workdir, name), member(other, name)
        assert metrics(one) == metrics(expected)
        assert (one / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
        for item in ("adapter", "opt_state"):
            found, wanted = arrays(one, step, item), kept_arrays(expected, step, item)
            assert found.keys() == wanted.keys()
            assert all(found[key].tobytes() == wanted[key].tobytes() for key in wanted)
    assert (workdir / "sweep.csv").read_text() == (other / "sweep.csv").read_text()


def assert_near(workdir, swept):
    """The adapters' losses are those of `swept`, but for the order in which sums run."""
    for path in sorted((workdir / "members").iterdir()):
        expected = member(swept, path.name if "mode=" in path.name else path.name.replace(",seed", ",mode=lora,seed"))
        for one, other in zip(metrics(path), metrics(expected), strict=True):
            for key in one.keys() & {"train/loss", "eval/loss"}:
                np.testing.assert_allclose(one[key], other[key], rtol=1e-5)


class Spy:
    """Takes the place of `make_members_step` and looks on."""

    def __init__(self, before_step=lambda step, state, frozen: None):
        self.before_step, self.calls, self.made = before_step, 0, 0

    def __call__(self, *arguments):
        step, self.made = running.make_members_step(*arguments), self.made + 1

        def spied(state, numbers, frozen, batch, number):
            self.calls += 1
            self.before_step(int(number) + 1, state, frozen)
            return step(state, numbers, frozen, batch, number)

        return running.Uncompiled(spied)


@pytest.fixture
def spied(monkeypatch):
    def spy(before_step=lambda *_: None):
        found = Spy(before_step)
        monkeypatch.setattr(
            group,
            "members_lib",
            Replaced(members, make_members_step=found, make_members_eval_step=running.make_members_eval_step),
        )
        return found

    return spy


class Replaced:
    """A module with other values of some names."""

    def __init__(self, module, **names):
        self.__dict__.update(vars(module) | names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The tiny run with half its rows and three of its targets: members take a step one after the other."""
    folder = tmp_path_factory.mktemp("tiny")
    flag, file = running.write_tiny(folder), folder / "tiny.py"
    text = file.read_text().replace('"batch_size": 4', '"batch_size": 2')
    file.write_text(text.replace('"rank": 4,', '"rank": 4, "targets": ("q_proj", "gate_proj", "up_proj"),'))
    return flag


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny) -> pathlib.Path:
    """The workdir of a finished sweep: four adapters in one group, the full fine-tuning baseline in another. Read only."""
    workdir = tmp_path_factory.mktemp("swept") / "ranks"
    finished = running.run("sweep", tiny, f"--workdir={workdir}", *GRID)
    assert finished.code == 0, finished.err
    return workdir


@pytest.fixture(scope="module")
def diverged(tmp_path_factory, tiny) -> pathlib.Path:
    """The workdir of a finished sweep in which two of four members diverged. Read only."""
    workdir = tmp_path_factory.mktemp("diverged") / "run"
    finished = sweep(tiny, workdir, *UNCLIPPED, *RATES)
    assert finished.code == 0, finished.err
    assert "learning_rate=1e+30,seed=0: the" in finished.out and "the others go on" in finished.out
    return workdir


# ---- Exactness -------------------------------------------------------------------------------------------------------


def assert_near_adapter(found, expected):
    """Of two checkpoints of the same step, in a sweep or alone."""
    assert found.keys() == expected.keys() and len(found) in (6, 14)  # of three targets or of seven
    for key in expected:
        assert np.linalg.norm(found[key] - expected[key]) < 1e-4 * np.linalg.norm(expected[key]), key
        # An element whose gradient is near zero gets its sign from rounding, and Adam moves it by a whole step.
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4)


@pytest.mark.slow
def test_members_equal_the_same_runs_alone(tiny, tmp_path):
    longer = (
        ALL_TARGETS,
        "--config.train.steps=50",
        "--config.eval.every=10",
        "--config.checkpoint.every=0",
        "--config.sample.every=0",
    )
    grid = {
        "lora.rank": (2, 8),
        "lora.dropout": (0.0, 0.2),
        "optim.schedule": ("constant", "cosine"),
        "optim.clip_norm": (0.0, 0.1),
    }
    overrides = [f"--config.sweep.{key}={values}" for key, values in grid.items()]
    assert sweep(tiny, tmp_path / "sweep", *longer, *overrides).code == 0
    for name, own in {
        "rank=2,dropout=0.2,schedule=cosine,clip_norm=0.1": (2, 0.2, "cosine", 0.1),
        "rank=8,dropout=0,schedule=constant,clip_norm=0": (8, 0.0, "constant", 0.0),
    }.items():
        overrides = [f"--config.{key}={value}" for key, value in zip(grid, own, strict=True)]
        alone, together = tmp_path / name, member(tmp_path / "sweep", name)
        assert running.run("train", tiny, f"--workdir={alone}", *longer, *overrides).code == 0
        for one, other in zip(metrics(together), metrics(alone), strict=True):
            assert one.keys() == other.keys() and one["step"] == other["step"]
            for key in one.keys() & {"train/loss", "eval/loss", "train/learning_rate", "train/tokens"}:
                np.testing.assert_allclose(one[key], other[key], rtol=1e-5)
        assert_near_adapter(arrays(together, 50, "adapter"), arrays(alone, 50, "adapter"))


@pytest.mark.slow
def test_the_base_is_read_once_compiled_once_and_held_once(tiny, tmp_path, caplog, spied):
    loads, alive = [], []
    shapes = {(1024, 128): 1, (4, 128, 384): 2, (4, 384, 128): 1}  # embedding; gate and up; down

    def count(step, state, frozen):
        for shape, expected in shapes.items():
            alive.append(sum(a.shape == shape for a in jax.live_arrays()) - expected)
        assert {name for name in named_leaves(frozen) if not name.startswith("params/")} == set()

    spy = spied(count)

    def counted(base, layout):
        loads.append(base.folder)
        return load_params(base, layout)

    running.forget_programs()
    before = {shape: sum(a.shape == shape for a in jax.live_arrays()) for shape in shapes}
    for shape, number in before.items():
        shapes[shape] += number  # what other tests of this process hold
    with jax.log_compiles():
        finished = sweep(
            tiny, tmp_path / "run", "--verbosity=-1", *ADAPTERS,
            "--config.sample.every=0", changes={"lowrank.sweeping.sweep.load_params": counted},
        )  # fmt: skip
    assert finished.code == 0, finished.err
    assert len(loads) == 1 and spy.calls == 6 and spy.made == 1
    assert caplog.text.count("Compiling jit(members_step)") == 1
    assert caplog.text.count("Compiling jit(members_eval_step)") == 1
    assert set(alive) == {0}


@pytest.mark.slow
def test_members_side_by_side_or_in_waves_are_the_same(tiny, swept, tmp_path, spied):
    spy = spied()
    finished = sweep(tiny, tmp_path / "run", *ADAPTERS, "--config.sweep.group_size=3", "--config.sweep.at_once=2")
    assert finished.code == 0, finished.err
    assert spy.made == 1 and spy.calls == 2 * 6  # 4 adapters in two waves of one program
    assert sorted(path.name for path in (tmp_path / "run" / "groups").iterdir()) == ["0.0", "0.1"]
    assert_near(tmp_path / "run", swept)


@pytest.mark.slow
def test_eight_devices_train_eight_members_at_once(tiny, swept, tmp_path):
    finished = sweep(tiny, tmp_path / "run", *GRID, devices=8)
    assert finished.code == 0, finished.err
    assert "mesh       member 8 x fsdp 1 x tensor 1 (8 x cpu)" in finished.out
    assert_near(tmp_path / "run", swept)


# ---- What is written -------------------------------------------------------------------------------------------------


def test_every_member_is_an_ordinary_workdir(swept, demo_base, tmp_path):
    base = demo_base
    assert sorted(path.name for path in (swept / "members").iterdir()) == sorted(NAMES)
    for name in NAMES:
        lines = metrics(member(swept, name))
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
        assert lines[1].keys() == (TRAIN_KEYS - {"train/tokens_per_second"}) | {"step"}
        assert steps(member(swept, name)) == [6]
        record = json.loads((member(swept, name) / "config.json").read_text())
        assert record["command"].startswith("python -m lowrank.sweep ") and record["config"]["data"]["seed"] == 0
        samples = running.lines(member(swept, name) / "samples.jsonl")
        assert [line["step"] for line in samples] == [0, 0, 3, 3, 6, 6]
    adapter = arrays(member(swept, NAMES[0]), 6, "adapter")
    assert adapter["lora/layers/self_attn/q_proj/lora_a"].shape == (4, 128, 1)  # its own rank, not the widest
    last = metrics(member(swept, NAMES[0]))[-1]["eval/loss"]
    data = tmp_path / "held_out.json"
    records = json.loads(pathlib.Path(record["config"]["data"]["train"]).read_text())
    data.write_text(json.dumps(records[-10:]))
    found = running.run("evaluate", f"--base={base}", f"--adapter={member(swept, NAMES[0])}", f"--data={data}")
    assert found.code == 0, found.err
    assert abs(float(re.search(r"loss (\d+\.\d+)", found.out)[1]) - last) < 2e-6
    flags = (f"--workdir={member(swept, NAMES[3])}", "--format=peft", f"--to={tmp_path / 'peft'}")
    assert running.run("export", *flags).code == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    full = running.run("generate", f"--base={base}", f"--adapter={member(swept, 'mode=full')}", "--prompt=Once")
    assert full.code == 0 and full.out


def test_a_member_is_the_run_alone_answers_as_it_does_and_goes_on_alone_as_it_would(tiny, tmp_path):
    answers = ("--config.eval.answers=3", "--config.sample.every=0")
    assert sweep(tiny, tmp_path / "sweep", *ADAPTERS, *answers).code == 0
    assert "eval/exact_match" in (tmp_path / "sweep" / "sweep.csv").read_text()
    run, alone = member(tmp_path / "sweep", "rank=1,seed=1"), tmp_path / "alone"
    own = ("--config.lora.rank=1", "--config.seed=1", "--config.data.seed=0", "--config.train.steps=8", *answers)
    finished = running.run("train", tiny, f"--workdir={run}", *own)
    assert finished.code == 0 and "resumed from step 6" in finished.out, finished.err
    assert running.run("train", tiny, f"--workdir={alone}", *own).code == 0
    for one, other in zip(metrics(run), metrics(alone), strict=True):
        for key in one.keys() - {"train/grad_norm"}:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5)
        assert one.get("eval/exact_match") == other.get("eval/exact_match")
    assert running.lines(run / "samples.jsonl") == running.lines(alone / "samples.jsonl")
    assert_near_adapter(arrays(run, 8, "adapter"), arrays(alone, 8, "adapter"))


def test_a_member_that_gets_worse_keeps_the_checkpoint_of_its_best_evaluation(tiny, diverged, tmp_path, spied):
    """To the bit what the members' step was given after it. The other members are those of another sweep, to the bit."""
    states = {}
    spied(lambda step, state, _: states.update({step - 1: jax.device_get((state.trainable, state.opt_state))}))
    rates = "--config.sweep.optim.learning_rate=(1e-3,0.2)"
    own = ("--config.eval.every=1", "--config.checkpoint.every=0", *UNCLIPPED)
    finished = sweep(tiny, tmp_path / "sweep", *own, rates, GRID[2])
    assert finished.code == 0, finished.err
    for i, rate in enumerate(("0.001", "0.001", "0.2", "0.2")):
        workdir = member(tmp_path / "sweep", f"learning_rate={rate},seed={i % 2}")
        losses = {line["step"]: line["eval/loss"] for line in metrics(workdir) if "eval/loss" in line}
        best = min(losses, key=losses.get)
        assert set(steps(workdir)) == {best, 6} - {0}
        assert rate == "0.001" or best not in (0, 6), "the member does not get worse: the test shows nothing"
        for item, tree in zip(("adapter", "opt_state"), states.get(best, ()), strict=best in states):
            found, expected = arrays(workdir, best, item), named_leaves(jax.tree.map(lambda leaf, i=i: leaf[i], tree))
            assert found.keys() == expected.keys()
            assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
        if rate == "0.001":  # there two members diverged, and every third step was evaluated
            other = metrics(member(diverged, workdir.name))
            assert len(other) == 1 + 6 + 2 and all(line in metrics(workdir) for line in other)


def test_the_tables_say_what_the_members_wrote(swept):
    with open(swept / "sweep.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["name"] for row in rows} == set(NAMES)
    losses = [float(row["eval/loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        lines = [line for line in metrics(member(swept, row["name"])) if "eval/loss" in line]
        assert float(row["eval/loss"]) == lines[-1]["eval/loss"] and row["steps"] == "6"
        full = row["name"] == "mode=full"
        assert row["lora.rank"] == ("" if full else row["name"].split(",")[0].removeprefix("rank="))
        per_rank = 4 * (256 + 512 + 512)  # by hand: rank times (in + out) of the three projections, four layers
        expected = 918_656 if full else int(row["lora.rank"]) * per_rank
        assert (row["trainable_parameters"], row["adapter_bytes"]) == (str(expected), str(4 * expected))
    text = (swept / "sweep.md").read_text()
    assert text.startswith("# ranks\n") and rows[0]["name"] in text and "![" in text
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tiny, tmp_path):
    finished = running.run("sweep", tiny, "--dry_run", *GRID)
    assert finished.code == 0, finished.err
    assert "5 members over lora.rank, train.mode, seed, in 2 groups" in finished.out
    assert "3 combinations are left out: in mode full neither the adapter nor the seed matters" in finished.out
    assert "4 members, 1 wave of 4 in one compiled step" in finished.out


# ---- Divergence ------------------------------------------------------------------------------------------------------


def test_a_member_that_diverges_is_frozen_and_marked(diverged):
    with open(diverged / "sweep.csv", newline="") as stream:
        *good, bad, other = csv.DictReader(stream)
    assert {row["name"] for row in good} == {"learning_rate=0.001,seed=0", "learning_rate=0.001,seed=1"}
    assert [(row["diverged_at"], row["steps"]) for row in good] == [("", "6")] * 2
    for row in (bad, other):
        assert row["eval/loss"] == "" and int(row["diverged_at"]) == int(row["steps"]) + 1 == 2
    gone = member(diverged, "learning_rate=1e+30,seed=0")
    assert max(line["step"] for line in metrics(gone)) < 2 and steps(gone) == [1]
    assert all(np.isfinite(leaf).all() for leaf in arrays(gone, 1, "adapter").values())
    assert "## Diverged" in (diverged / "sweep.md").read_text()


def test_a_sweep_whose_members_all_diverge_ends_and_says_so(tiny, tmp_path):
    rates = ("--config.sweep.optim.learning_rate=(1e25,1e30)", GRID[2])
    finished = sweep(tiny, tmp_path / "run", *UNCLIPPED, *rates)
    assert finished.code == 0 and "step 6/6" not in finished.out, finished.err
    assert "  1. diverged  learning_rate=" in finished.out and "  4. diverged  learning_rate=" in finished.out


# ---- Going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process as it is, for all that the code could do about it."""


@pytest.mark.parametrize(
    "at", [(1, 5), pytest.param((1, 2), marks=pytest.mark.slow), pytest.param((2, 4), marks=pytest.mark.slow)]
)
def test_a_killed_sweep_goes_on_to_the_bit_and_runs_no_finished_group_again(
    tiny, swept, tmp_path, monkeypatch, spied, at
):
    """`at`: the group and the step that is never made."""
    groups = []

    def kill(step, state, frozen):
        groups.append(step)
        if groups.count(1) == at[0] and step == at[1]:
            raise Killed

    spied(kill)
    with pytest.raises(Killed):
        sweep(tiny, tmp_path / "run", *GRID)
    # Of the killed group: checkpoint.every is 2, and the evaluation of step 3 is better than that of step 0.
    saved = max((at[1] - 1) // 2 * 2, 3 if at[1] > 3 else 0)
    spy, written, whole = spied(), [], wave.write_member

    def write(*arguments):
        if len(written) == 2:
            raise Killed
        written.append(whole(*arguments))
        return written[-1]

    if at[0] == 1:  # killed again, when two members are written
        monkeypatch.setattr(wave, "write_member", write)
        with pytest.raises(Killed):
            sweep(tiny, tmp_path / "run", *GRID)
        assert spy.calls == 6 - saved
        monkeypatch.setattr(wave, "write_member", whole)
        saved = 6
        spy = spied()
    finished = sweep(tiny, tmp_path / "run", *GRID)
    assert finished.code == 0, finished.err
    assert spy.calls == (6 - saved) + (6 if at[0] == 1 else 0)
    assert_same_sweep(tmp_path / "run", swept)
    assert not list((tmp_path / "run" / "groups").glob("*/checkpoints"))
    # And once more: nothing is left to do.
    again = spied()
    assert sweep(tiny, tmp_path / "run", *GRID).code == 0 and again.calls == 0
    assert (tmp_path / "run" / "sweep.csv").read_text() == (swept / "sweep.csv").read_text()


@pytest.mark.slow
def test_tables_after_resuming_are_those_of_an_uninterrupted_sweep(tiny, tmp_path, spied):
    """What JSON makes of a tuple is not what was swept: seeds of one setting fell apart."""
    short = ("--config.sample.every=0", "--config.train.steps=2", "--config.sweep.group_size=1")
    grid = (
        "--config.sweep.lora.targets=(('q_proj','v_proj'),)",
        "--config.sweep.lora.ranks=({'q_proj':2},)",
        "--config.sweep.seed=0,1",
    )
    assert sweep(tiny, tmp_path / "run", *short, *grid).code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    parts = []

    def kill(step, state, frozen):
        parts.append(step)
        if parts.count(1) == 1:
            raise Killed

    shutil.rmtree(tmp_path / "run" / "groups" / "0.1")  # the second wave is to be trained again
    (tmp_path / "run" / "groups" / "0.0" / "checkpoints" / "1").mkdir(parents=True)  # killed before it was tidied up
    spied(kill)
    with pytest.raises(Killed):
        sweep(tiny, tmp_path / "run", *short, *grid)
    spied()
    assert sweep(tiny, tmp_path / "run", *short, *grid).code == 0
    for name in ("sweep.csv", "sweep.md"):
        text, expected = ((tmp_path / run / name).read_text().split("\n", 1)[1] for run in ("run", "whole"))
        assert text == expected
    assert "(2 seeds)" in expected
    assert not list((tmp_path / "run" / "groups").glob("*/checkpoints"))


def test_a_finished_member_may_go_on_alone_and_the_sweep_goes_on_without_it(tiny, swept, tmp_path):
    workdir, name = tmp_path / "run", "rank=1,mode=lora,seed=0"
    shutil.copytree(swept, workdir)
    shutil.rmtree(workdir / "groups" / "1.0")
    own = ("--config.lora.rank=1", "--config.data.seed=0", "--config.checkpoint.keep=1", "--config.train.steps=8")
    alone = running.run("train", tiny, f"--workdir={member(workdir, name)}", *own)
    assert alone.code == 0, alone.err
    finished = sweep(tiny, workdir, *GRID)
    assert finished.code == 0, finished.err
    assert (workdir / "sweep.csv").read_text() == (swept / "sweep.csv").read_text()


@pytest.mark.slow
def test_a_sweep_goes_on_over_more_devices(tiny, swept, tmp_path, spied):
    spied(lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert sweep(tiny, tmp_path / "run", *ADAPTERS).code == 75
    spied()
    finished = sweep(tiny, tmp_path / "run", *ADAPTERS, devices=2)
    assert finished.code == 0, finished.err
    assert "mesh       member 2 x fsdp 1" in finished.out and "4 members" in finished.out
    assert_near(tmp_path / "run", swept)


def test_a_diverged_member_stays_diverged_after_resuming(tiny, diverged, tmp_path, spied):
    def kill(step, state, frozen):
        if step == 6:
            raise Killed

    spied(kill)
    with pytest.raises(Killed):
        sweep(tiny, tmp_path / "run", *UNCLIPPED, *RATES)
    spied()
    assert sweep(tiny, tmp_path / "run", *UNCLIPPED, *RATES).code == 0
    assert (tmp_path / "run" / "sweep.csv").read_text() == (diverged / "sweep.csv").read_text()
    name = "learning_rate=1e+30,seed=0"
    one, other = (arrays(member(workdir, name), 1, "adapter") for workdir in (tmp_path / "run", diverged))
    assert all(one[key].tobytes() == other[key].tobytes() for key in other)


def test_a_stop_signal_saves_and_ends_with_its_own_exit_code(tiny, swept, tmp_path, spied):
    def stop_at(last):
        return spied(lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == last else None)

    stop_at(3)
    stopped = sweep(tiny, tmp_path / "run", *GRID)
    assert stopped.code == 75, stopped.err
    assert "stopped by SIGTERM after step 3, which is saved" in stopped.out
    assert "run the same command again to go on" in stopped.out
    spy = stop_at(6)  # the last step of a group: no other is begun
    stopped = sweep(tiny, tmp_path / "run", *GRID)
    assert stopped.code == 75 and spy.calls == 3, stopped.err
    spied()
    assert sweep(tiny, tmp_path / "run", *GRID).code == 0
    assert_same_sweep(tmp_path / "run", swept)


@pytest.mark.slow
def test_processes_stopped_by_sigkill_end_as_an_uninterrupted_one(tiny, tmp_path):
    longer = (tiny, *GRID, "--config.train.steps=20", "--config.eval.every=5")
    whole = running.start("sweep", *longer, f"--workdir={tmp_path / 'whole'}")
    assert running.finish(whole, timeout=400).code == 0
    workdir = tmp_path / "run"
    for place, step in ((NAMES[0], 3), (NAMES[1], 11), ("mode=full", 7), ("mode=full", 20)):
        process = running.start("sweep", *longer, f"--workdir={workdir}")
        file = member(workdir, place) / "metrics.jsonl"
        for _ in range(4000):
            if process.poll() is not None or (file.exists() and f'"step": {step}, "train' in file.read_text()):
                break
            time.sleep(0.05)
        process.kill()
        assert running.finish(process).code == -signal.SIGKILL
    last = running.finish(running.start("sweep", *longer, f"--workdir={workdir}"), timeout=400)
    assert last.code == 0 and last.err == ""
    assert_same_sweep(workdir, tmp_path / "whole", step=20)


# ---- What is refused -------------------------------------------------------------------------------------------------


def refused(finished) -> str:
    assert finished.code == 1 and finished.err.startswith("error: "), finished
    (line,) = finished.err.splitlines()
    return line


def test_a_sweep_of_another_grid_is_refused(tiny, swept, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(swept, workdir)
    other = ("--config.sweep.lora.rank=(1,8)", *GRID[1:])
    line = refused(sweep(tiny, workdir, *other))
    assert (
        f"workdir {workdir} holds another sweep: the grid no longer has rank=4,mode=lora,seed=0; rank=4,mode=lora,seed=1"
        in line
    )
    assert "also has rank=8,mode=lora,seed=0; rank=8,mode=lora,seed=1" in line
    line = refused(sweep(tiny, workdir, *GRID, "--config.sweep.group_size=2"))
    assert "config.sweep.group_size was 0 and is 2" in line
    line = refused(sweep(tiny, workdir, *GRID, "--config.optim.b1=0.5"))
    assert "config.optim.b1 was 0.9 and is 0.5 (in rank=1,mode=lora,seed=0 and others)" in line
    line = refused(sweep(tiny, workdir, *GRID, "--config.train.steps=8"))
    assert "rank=1,mode=lora,seed=0 was trained for 6 steps, and the config asks for 8; choose another" in line


def test_the_workdir_of_something_else_is_refused(tiny, swept):
    run = member(swept, NAMES[0])
    assert "is no sweep's (no sweep.json); choose another --workdir" in refused(sweep(tiny, run, *GRID))
    assert "is no run's (no config.json)" in refused(running.run("train", tiny, f"--workdir={swept}"))


@pytest.mark.parametrize("trained_again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_of_a_finished_member_is_named(tiny, swept, tmp_path, trained_again):
    workdir = tmp_path / "run"
    shutil.copytree(swept, workdir)
    folder = member(workdir, NAMES[0]) / "checkpoints" / "6"
    for file in (folder / "adapter").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"\0" * 10)
    line = refused(sweep(tiny, workdir, *GRID))
    assert f"checkpoint {folder} of a finished member cannot be read; remove {workdir}/groups/0.0" in line
    if trained_again:
        shutil.rmtree(workdir / "groups" / "0.0")
        assert sweep(tiny, workdir, *GRID).code == 0
        assert_same_sweep(workdir, swept)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_group_is_named(tiny, tmp_path, spied):
    def kill(step, state, frozen):
        if step == 6:
            raise Killed

    spied(kill)
    with pytest.raises(Killed):
        sweep(tiny, tmp_path / "run", *ADAPTERS)
    spied()
    folder = tmp_path / "run" / "groups" / "0.0" / "checkpoints"
    newest = max(folder.iterdir(), key=lambda path: int(path.name))
    for file in (newest / "adapter").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"\0" * 10)
    line = refused(sweep(tiny, tmp_path / "run", *ADAPTERS))
    assert f"checkpoint {newest} cannot be read" in line and "remove that folder to go on from the one before" in line
    shutil.rmtree(newest)
    assert sweep(tiny, tmp_path / "run", *ADAPTERS).code == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--config.sweep.lora.rank=(4,256)",), "rank 256 above q_proj (128), gate_proj (128), up_proj (128): no update of these matrices can have it; use a smaller rank"),
        (("--config.sweep.lora.rank=()",), "config.sweep.lora.rank is empty"),
        (("--config.sweep.lora.rnk=(1,2)",), "config.sweep.lora.rnk is no config key; did you mean config.sweep.lora.rank?"),
        (("--config.sweep.lora.rank=(4,4)",), "two members of the name rank=4"),
        (("--config.sweep.seed=(0,1)", "--config.log.wandb=project"), "config.log.wandb=project: "),
        (("--config.sweep.lora.targets=('q_proj','up_proj')", "--config.lora.rank=200"), "rank 200 above q_proj (128)"),
        (("--config.sweep.lora.ranks=({'q_proj':200},{})",), "rank 200 above q_proj (128): no update of these matrices can have it"),
        (("--config.sweep.seed=(0,1)", "--config.eval.every=0"), "config.eval.every=0: a sweep compares its members by what is held out"),
        ((), "config.sweep is empty; name what to try"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_with_one_line(tiny, tmp_path, overrides, message):
    assert message in refused(sweep(tiny, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_and_a_sweep_for_train_are_answered_with_one_line(tiny, tmp_path):
    assert "--workdir is missing" in refused(running.run("sweep", tiny, *GRID))
    line = refused(running.run("train", tiny, f"--workdir={tmp_path / 'run'}", *GRID))
    assert "config.sweep is set, but this is one run: use python -m lowrank.sweep" in line


def test_a_rank_that_some_matrices_cannot_use_is_told(tiny):
    finished = running.run("sweep", tiny, "--dry_run", ALL_TARGETS, "--config.sweep.lora.rank=(4,128)")
    assert finished.code == 0
    assert "note       rank 128 above k_proj (64), v_proj (64): there the update cannot use all of it" in finished.out


# ---- The profile -----------------------------------------------------------------------------------------------------


def test_a_sweep_is_traced_and_says_where(tiny, tmp_path):
    finished = sweep(tiny, tmp_path / "sweep", *UNCLIPPED, *ADAPTERS, "--config.checkpoint.every=0", "--profile=2:3")
    assert finished.code == 0, finished.err
    assert f"profile of steps 2 to 3 in {tmp_path / 'sweep' / 'profile'}" in finished.out
    assert list((tmp_path / "sweep" / "profile").rglob("*.xplane.pb"))


def test_steps_that_no_wave_has_are_refused_before_there_is_a_workdir(tiny, tmp_path):
    finished = sweep(tiny, tmp_path / "sweep", *ADAPTERS, "--profile=2:9")
    assert finished.code == 1 and "this run ends at step 6" in finished.err
    assert not (tmp_path / "sweep").exists()
