"""The training command: what it trains, what it keeps, and that a run that was stopped goes on as if it had not been.

Stopped runs are made from a finished one by taking away what would not be there yet; real signals to real processes
are in the slow tests at the end.
"""

import dataclasses
import fcntl
import functools
import importlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
import running
from running import TRAIN_KEYS, arrays, assert_same_run, largest_file, metrics, steps

from lowrank import runs
from lowrank.adapters.config import LoraConfig
from lowrank.cli import config_file
from lowrank.config import Config, TrainConfig
from lowrank.errors import UserError
from lowrank.inference import model as model_lib
from lowrank.parallel import mesh
from lowrank.runs import inputs
from lowrank.runs.adapter import Adapter, check_init_adapter
from lowrank.training.partition import named_leaves
from lowrank.training.step import make_eval_step


def train(tiny, workdir, *overrides, **options):
    return running.run("train", tiny, f"--workdir={workdir}", *overrides, **options)


def without_checkpoints(trained, workdir, gone) -> pathlib.Path:
    """A copy of a run whose newest checkpoints were never written."""
    shutil.copytree(trained, workdir)
    for step in gone:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


class Enough(BaseException):
    """Ends a run whose first step is not needed."""


def enough(number):
    raise Enough


class Spy:
    """Takes the place of `abstract_step` and keeps what goes through the step."""

    def __init__(self, before_step=lambda number: None):
        self.before_step = before_step
        self.calls = 0

    def __call__(self, *arguments):
        made = running.abstract_step(*arguments)

        def step(state, frozen, batch):
            if self.calls == 0:
                self.first = jax.device_get((state.trainable, frozen))
            self.calls += 1
            self.before_step(self.calls)
            state, scalars = made.function(state, frozen, batch)
            self.trainable, self.frozen = state.trainable, frozen
            return state, scalars

        return dataclasses.replace(made, function=running.Uncompiled(step))


# ---- What is trained -------------------------------------------------------------------------------------------------


def test_the_base_is_unchanged_every_adapter_leaf_moves_and_the_step_compiles_once(tiny, tmp_path, caplog):
    spy = Spy()
    overrides = ("--verbosity=-1", "--config.lora.rank=3", "--config.sample.every=0", "--config.eval.every=0")
    with jax.log_compiles():
        finished = train(tiny, tmp_path / "run", *overrides, changes={"lowrank.runs.train.abstract_step": spy})
    assert finished.code == 0
    trainable, frozen = (named_leaves(tree) for tree in spy.first)
    assert len(frozen) == 11 and len(trainable) == 14
    for name, leaf in named_leaves(spy.frozen).items():
        assert np.asarray(leaf).tobytes() == frozen[name].tobytes(), name
    for name, leaf in named_leaves(spy.trainable).items():
        assert not np.array_equal(leaf, trainable[name]), name
    assert spy.calls == 6 and caplog.text.count("Compiling jit(train_step)") == 1


def test_full_mode_trains_every_parameter_and_no_adapter(tiny, tmp_path):
    spy = Spy()
    overrides = ("train.mode=full", "train.steps=3", "sample.every=0", "eval.every=0")
    overrides = [f"--config.{override}" for override in overrides]
    finished = train(tiny, tmp_path / "run", *overrides, changes={"lowrank.runs.train.abstract_step": spy})
    assert finished.code == 0
    assert "trainable  918,656 of 918,656 parameters = 100 %" in finished.out
    trainable, frozen = (named_leaves(tree) for tree in spy.first)
    assert frozen == {} and len(trainable) == 11
    for name, leaf in named_leaves(spy.trainable).items():
        assert not np.array_equal(leaf, trainable[name]), name
    assert arrays(tmp_path / "run", 3, "adapter").keys() == trainable.keys()


def test_init_adapter_starts_from_another_runs_adapter(tiny, trained, tmp_path):
    spy = Spy(enough)
    overrides = (f"--config.init_adapter={trained}", "--config.sample.every=0")
    with pytest.raises(Enough):
        train(tiny, tmp_path / "run", *overrides, changes={"lowrank.runs.train.abstract_step": spy})
    begun, source = named_leaves(spy.first[0]), arrays(trained, 6, "adapter")
    assert begun.keys() == source.keys()
    assert all(np.array_equal(begun[name], source[name]) for name in source)
    # The evaluation before step 1 is the other run's last one, to the last bit.
    assert metrics(tmp_path / "run")[0]["eval/loss"] == metrics(trained)[-1]["eval/loss"]


def test_init_adapter_that_means_something_else_is_refused_with_all_differences(tiny, trained, tmp_path):
    overrides = ("--config.lora.rank=8", "--config.lora.alpha=4", "--config.lora.targets=q_proj")
    finished = train(tiny, tmp_path / "run", f"--config.init_adapter={trained}", *overrides)
    assert finished.code == 1
    assert "rank is 4 there and 8 here" in finished.err
    assert "alpha is 8.0 there and 4.0 here" in finished.err
    assert "targets is" in finished.err


@pytest.mark.slow
def test_an_uneven_run_is_started_from_through_peft_with_the_same_ranks_said(tiny, tmp_path):
    """PEFT's files have no alpha for a layer without an adapter: what the config says of it there differs from nothing."""
    uneven = ("--config.lora.ranks={'v_proj': (1, 0, 3, 3)}", "--config.lora.alphas={'v_proj': 6}")
    settings = ("--config.lora.targets=q_proj,v_proj", "--config.train.steps=1", "--config.eval.every=0", *uneven)
    settings = (*settings, "--config.sample.every=0")
    first, peft, second = tmp_path / "first", tmp_path / "peft", tmp_path / "second"
    assert train(tiny, first, *settings).code == 0
    assert running.run("export", f"--workdir={first}", "--format=peft", f"--to={peft}").code == 0
    spy = Spy()
    finished = train(
        tiny, second, *settings, f"--config.init_adapter={peft}", changes={"lowrank.runs.train.abstract_step": spy}
    )
    assert finished.code == 0, finished.err
    source = arrays(first, 1, "adapter")
    assert all(np.array_equal(leaf, source[name]) for name, leaf in named_leaves(spy.first[0]).items())
    finished = train(
        tiny, tmp_path / "other", *settings, f"--config.init_adapter={peft}", "--config.lora.alphas={'v_proj': 7}"
    )
    assert finished.code == 1 and "lora.alphas is" in finished.err and "(7.0, None, 7.0, 7.0)" in finished.err


def test_what_the_config_says_of_layers_without_an_adapter_differs_from_nothing():
    """PEFT's files have no alpha there."""
    lora = LoraConfig(
        4, 8.0, targets=("v_proj",), ranks=(("v_proj", (1, 0, 3)),), alphas=(("v_proj", (6.0, 1.0, 6.0)),)
    )
    adapter = Adapter(pathlib.Path(), lora, None, None, None, None, restore=dict)
    here = dataclasses.replace(lora, alphas=(("v_proj", (6.0,)),))
    check_init_adapter(adapter, Config(lora=here), layers=3)
    other = dataclasses.replace(lora, alphas=(("v_proj", (7.0,)),))
    with pytest.raises(UserError, match=r"lora.alphas is .*\(6.0, None, 6.0\).* there and .*\(7.0, None, 7.0\).* here"):
        check_init_adapter(adapter, Config(lora=other), layers=3)


def test_an_adapter_to_start_from_that_does_not_fit_leaves_no_workdir(tiny, trained, tmp_path, demo_base):
    other = shutil.copytree(demo_base, tmp_path / "other", copy_function=shutil.copyfile)
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(0.123).tobytes())
    finished = train(tiny, tmp_path / "run", f"--config.init_adapter={trained}", f"--config.base={other}")
    assert (
        finished.code == 1
        and f"was trained over other weights than those in {other}; give its own base" in finished.err
    )
    lora = tmp_path / "lora"
    assert running.run("export", f"--workdir={trained}", "--format=peft", f"--to={lora}").code == 0
    smaller = running.without_last_layer(demo_base, tmp_path / "smaller")
    finished = train(tiny, tmp_path / "run", f"--config.init_adapter={lora}", f"--config.base={smaller}")
    assert finished.code == 1 and "give" in finished.err and finished.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_zeros_of_uneven_ranks_are_not_counted_as_trained(tiny, tmp_path):
    finished = train(
        tiny, tmp_path / "run", "--dry_run", "--config.lora.ranks={'q_proj': (8, 8, 4, 0), 'down_proj': 1}"
    )
    # 20 ranks x (128 + 128) of q_proj, 4 x (384 + 128) of down_proj, and rank 4 in four layers of the other five
    others = 4 * 4 * ((128 + 64) * 2 + (128 + 128) + 2 * (128 + 384))
    assert f"trainable  {20 * 256 + 4 * 512 + others:,} of " in finished.out, finished.out + finished.err


def test_ranks_for_another_number_of_layers_are_refused(tiny, tmp_path):
    overrides = ("--config.lora.ranks={'q_proj': (1, 2), 'v_proj': 3}", "--config.lora.alphas={'o_proj': (1, 2, 3)}")
    finished = train(tiny, tmp_path / "run", *overrides)
    assert finished.code == 1 and not (tmp_path / "run").exists()
    assert (
        "config.lora.ranks.q_proj has 2 values; config.lora.alphas.o_proj has 3 values; the base has 4 layers"
        in finished.err
    )


def test_a_run_from_before_a_key_or_a_field_existed_goes_on(tiny, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "config.json").read_text())
    del record["config"]["lora"]["ranks"], record["identity"]["architecture"]["windows"]
    (run / "config.json").write_text(json.dumps(record))
    finished = train(tiny, run, "--config.train.steps=8")
    assert finished.code == 0 and "resumed from step 6" in finished.out, finished.err
    finished = train(tiny, run, "--config.train.steps=8", "--config.lora.ranks={'q_proj': 1}")
    assert finished.code == 1 and "config.lora.ranks was [] and is [['q_proj', [1]]]" in finished.err


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_evaluation_covers_every_example_once_whatever_the_batch_size(tiny, tmp_path, packing):
    counted = []

    def counting_eval_step(*arguments):
        step = make_eval_step(*arguments)

        def eval_step(*arguments):
            loss, count = step(*arguments)
            counted[-1] += int(count)
            return loss, count

        return running.Uncompiled(eval_step)

    losses = []
    for batch_size in (3, 7):
        counted.append(0)
        workdir = tmp_path / f"run{batch_size}"
        with pytest.raises(Enough):
            train(
                tiny,
                workdir,
                f"--config.train.batch_size={batch_size}",
                f"--config.data.packing={packing}",
                "--config.sample.every=0",
                changes={
                    "lowrank.runs.train.abstract_step": Spy(enough),
                    "lowrank.runs.train.make_eval_step": counting_eval_step,
                },
            )
        losses.append(metrics(workdir)[0]["eval/loss"])
    assert counted[0] > 0 and counted == [counted[0]] * 2
    # The same numbers, added in another order.
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


# ---- What is written -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_no_base_leaf(trained):
    assert steps(trained) == [3, 4, 6]
    for step in steps(trained):
        folder = trained / "checkpoints" / str(step)
        assert {"adapter", "opt_state", "data", "meta"} <= {path.name for path in folder.iterdir()}
        for item in ("adapter", "opt_state"):
            leaves = json.loads((folder / item / "_METADATA").read_text())["tree_metadata"]
            assert leaves and not [name for name in leaves if "params" in name]
            assert [name for name in leaves if "lora_a" in name]
        # The adapter has 38,912 parameters in float32 and two moments of each; the base alone is 3,674,624 bytes.
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 700_000


def test_metrics_and_samples_are_as_the_contract_says(trained):
    lines = running.lines(trained / "metrics.jsonl")
    evaluations = [line for line in lines if "eval/loss" in line]
    trainings = [line for line in lines if "train/loss" in line]
    assert len(lines) == len(evaluations) + len(trainings)
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert [line["step"] for line in trainings] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == {"step", "eval/loss", "eval/perplexity"} for line in evaluations)
    assert all(line.keys() == {"step", *TRAIN_KEYS} for line in trainings)
    assert [line["train/tokens"] for line in trainings] == sorted({line["train/tokens"] for line in trainings})
    # Pauses (here an evaluation or a save nearly every step) are not counted twice: that gave 7e11 tokens a second.
    assert all(0 < line["train/tokens_per_second"] < 1e7 for line in trainings)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    samples = running.lines(trained / "samples.jsonl")
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, prompt) for step in (0, 3, 6) for prompt in ("Once upon a time", "Name a colour.")
    ]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_checkpoints_stay_and_the_best_one(tiny, tmp_path):
    losses = iter([9.0, 5.0, 3.0, 4.0, 4.0, 6.0, 4.0])  # before step 1, and after each

    def made_up(*_):
        return running.Uncompiled(lambda *_: (next(losses), 1))

    overrides = ("checkpoint.keep=2", "checkpoint.every=1", "eval.every=1", "sample.every=0", "data.eval_examples=1")
    workdir = tmp_path / "run"
    finished = train(
        tiny, workdir, *(f"--config.{x}" for x in overrides), changes={"lowrank.runs.train.make_eval_step": made_up}
    )
    assert finished.code == 0
    assert steps(workdir) == [2, 5, 6]


def test_dry_run_prints_what_would_be_trained_and_writes_nothing(tiny, tmp_path):
    finished = running.run("train", tiny, f"--workdir={tmp_path / 'run'}", "--dry_run")
    assert finished.code == 0 and finished.err == ""
    assert list(tmp_path.iterdir()) == []
    for pattern in (
        r"base +918,656 frozen +3\.7 MB",
        r"adapter +38,912 trained +155\.6 KB",
        r"optimizer +77,82\d state +311\.3 KB",
        r"trainable +38,912 of 957,568 parameters = 4\.064 %",
        r"mesh +data 1 x fsdp 1 x tensor 1",
        r"data +50 examples \(completion\), [\d,]+ tokens, [\d,]+ trained on; \d+ truncated to 64, \d+ dropped",
        r"held out +10 examples",
        r"rows +\d+ an epoch, packed, \d\d\.\d % filled",
        r"steps +6, each 4 rows in 1 micro-batches = 256 tokens with padding; \d+\.\d steps an epoch",
        r"lora/layers/self_attn/q_proj/lora_a +\(4, 128, 4\) +float32 +trained +\(-, fsdp, -\)",
        r"params/layers/mlp/down_proj/kernel +\(4, 384, 128\) +float32 +frozen +\(-, tensor, fsdp\)",
    ):
        assert re.search(pattern, finished.out), pattern


def test_the_tokens_of_large_data_are_written_beside_the_workdir_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CACHED", 1)  # bytes of large data
    flags = (f"--workdir={tmp_path / 'run'}", "--dry_run")
    first, second = running.run("train", tiny, *flags), running.run("train", tiny, *flags)
    (entry,) = (tmp_path / ".tokens").iterdir()
    assert list(tmp_path.iterdir()) == [tmp_path / ".tokens"]
    assert f", once: the tokens go to {entry}" in first.out and f"are in {entry}" in second.out
    assert first.out.splitlines()[1:] == second.out.splitlines()[1:]
    mounted = mock.patch.object(pathlib.Path, "is_mount", lambda path: True)
    with mounted:  # what lies beside it is on another disk
        third = running.run("train", tiny, *flags)
    assert f"go to {tmp_path / 'run' / '.tokens'}" in third.out
    assert running.run("train", tiny, flags[0], "--config.train.steps=1").code == 0  # its workdir may hold the tokens


def test_steps_come_from_epochs_where_no_steps_are_given(tiny):
    out = running.run("train", tiny, "--dry_run", "--config.train.steps=None", "--config.train.epochs=2").out
    rows = int(re.search(r"rows +(\d+) an epoch", out)[1])
    assert f"steps      {-(-2 * rows // 4)}, each 4 rows" in out
    assert "steps      6, each 4 rows" in running.run("train", tiny, "--dry_run", "--config.train.epochs=2").out


# ---- Stopped and resumed ---------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    finished = train(tiny, workdir)
    assert finished.code == 0 and "resumed from step 4" in finished.out
    assert_same_run(workdir, trained)


def test_killed_before_the_first_checkpoint_equals_uninterrupted(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[3, 4, 6])
    finished = train(tiny, workdir)
    assert finished.code == 0 and "resumed" not in finished.out
    assert_same_run(workdir, trained)


def test_killed_while_writing_equals_uninterrupted(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[])
    half = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    (workdir / "checkpoints" / "6").rename(half)  # a save that did not come to its end
    shutil.rmtree(half / "opt_state")
    (workdir / "checkpoints" / "5.orbax-checkpoint-tmp-1700000000000000").mkdir()
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train/lo')  # a line that did not come to its end
    (workdir / "config.tmp").write_text("{")
    (workdir / "metrics.tmp").write_text("{")
    finished = train(tiny, workdir)
    assert finished.code == 0 and "resumed from step 4" in finished.out
    assert_same_run(workdir, trained)
    assert steps(workdir) == [3, 4, 6]  # and nothing half written is left


def test_killed_while_removing_an_old_checkpoint_equals_uninterrupted(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    shutil.rmtree(workdir / "checkpoints" / "3" / "adapter")
    for file in ("commit_success.txt", "_CHECKPOINT_METADATA"):
        (workdir / "checkpoints" / "3" / file).unlink(missing_ok=True)
    assert train(tiny, workdir).code == 0
    assert_same_run(workdir, trained)


def test_killed_before_the_config_was_written_begins(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.tmp"):
        (tmp_path / "run" / name).touch()
    spy = Spy(enough)
    with pytest.raises(Enough):
        train(tiny, tmp_path / "run", "--config.sample.every=0", changes={"lowrank.runs.train.abstract_step": spy})
    assert spy.calls == 1 and not steps(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "checkpoints",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stop_signal_saves_and_ends_with_its_own_exit_code(tiny, trained, tmp_path, number):
    spy = Spy(lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    stopped = train(tiny, tmp_path / "run", changes={"lowrank.runs.train.abstract_step": spy})
    assert stopped.code == 75
    assert f"stopped by {number.name} after step 5, which is saved; run the same command again" in stopped.out
    assert steps(tmp_path / "run")[-1] == 5
    assert train(tiny, tmp_path / "run").code == 0
    assert_same_run(tmp_path / "run", trained)


def test_a_complete_run_says_so_and_goes_on_with_more_steps(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[])
    finished = train(tiny, workdir)
    assert finished.code == 0 and "is complete at step 6; raise config.train.steps to go on" in finished.out
    assert_same_run(workdir, trained)
    # How long, and how often it tells and saves, may change.
    changes = ("train.steps=8", "log.every=4", "eval.every=8", "checkpoint.every=3", "sample.every=7")
    assert train(tiny, workdir, *(f"--config.{change}" for change in changes)).code == 0
    assert [line["step"] for line in metrics(workdir)] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 8, 8]
    assert metrics(workdir)[:9] == metrics(trained)


def test_another_base_data_file_and_training_config_are_refused_together(tiny, trained, tmp_path, demo_base):
    before = (trained / "config.json").read_bytes()
    base = shutil.copytree(demo_base, tmp_path / "base", copy_function=shutil.copyfile)
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(0.123).tobytes())
    records = json.loads(pathlib.Path(tiny.removeprefix("--config=")).with_name("data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[:-1]))
    finished = train(
        tiny,
        trained,
        f"--config.base={base}",
        f"--config.data.train={tmp_path / 'data.json'}",
        "--config.lora.rank=2",
        "--config.optim.learning_rate=0.5",
    )
    assert finished.code == 1
    for difference in (
        "base has other weights",
        "data.train has other content",
        "config.lora.rank was 4 and is 2",
        "config.optim.learning_rate was 0.001 and is 0.5",
    ):
        assert difference in finished.err
    assert (trained / "config.json").read_bytes() == before


def test_the_same_base_and_data_may_lie_elsewhere(tiny, trained, tmp_path, demo_base):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    data = pathlib.Path(tiny.removeprefix("--config=")).with_name("data.json")
    shutil.copy(data, tmp_path / "moved.json")
    (tmp_path / "base").symlink_to(demo_base)
    moved = (f"--config.base={tmp_path / 'base'}", f"--config.data.train={tmp_path / 'moved.json'}")
    assert train(tiny, workdir, *moved).code == 0
    assert_same_run(workdir, trained)


# ---- Speed -----------------------------------------------------------------------------------------------------------


def test_the_console_shows_speed_and_a_profile_is_written(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[4, 6])
    finished = train(tiny, workdir, "--profile=5:6", "--config.sample.every=0")
    assert finished.code == 0, finished.err
    lines = re.findall(
        r"^step \d+/6  loss .* tokens_per_second [\d.,]+  mfu [\d.]+%  waiting [\d.]+%$", finished.out, re.M
    )
    assert len(lines) == 3, finished.out
    assert f"profile of steps 5 to 6 in {workdir / 'profile'}" in finished.out
    (trace,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
    names = trace.read_bytes()
    assert b"train_step" in names and b"step_num" in names
    shutil.rmtree(workdir / "checkpoints" / "6")
    again = train(tiny, workdir, "--profile=4:6", "--config.sample.every=0")
    assert again.code == 0 and "--profile=4:6: step 4 is done already, so nothing is traced" in again.out


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ("5", "is no range of steps; --profile=START:STOP is the first and the last"),
        ("3:2", "is no range of steps"),
        ("0:2", "is no range of steps"),
        ("5:9", "this run ends at step 6"),
    ],
)
def test_a_profile_of_steps_that_are_not_done_is_refused(tiny, tmp_path, profile, why):
    finished = train(tiny, tmp_path / "run", f"--profile={profile}")
    assert finished.code == 1 and finished.err.startswith(f"error: --profile={profile}") and why in finished.err


# ---- Stopped for good ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])

    def poisoned(*arguments):
        made = running.abstract_step(*arguments)

        def poisoned_step(state, frozen, batch):
            if int(state.step) == 4:
                frozen = jax.tree.map(lambda leaf: leaf * np.nan, frozen)
            return made.function(state, frozen, batch)

        return dataclasses.replace(made, function=running.Uncompiled(poisoned_step))

    finished = train(tiny, workdir, changes={"lowrank.runs.train.abstract_step": poisoned})
    assert finished.code == 1
    assert re.fullmatch(
        r"error: step 5: the loss is nan .* its examples are \d+(, \d+)* .*the checkpoint of step 4 is intact.*\n",
        finished.err,
    )
    assert steps(workdir) == [3, 4]
    assert train(tiny, workdir).code == 0  # and the run can go on
    assert_same_run(workdir, trained)


@pytest.mark.slow
def test_a_learning_rate_too_high_stops_the_run_before_a_checkpoint(tiny, tmp_path):
    overrides = (
        "--config.optim.learning_rate=1e30",
        "--config.optim.warmup_steps=0",
        "--config.checkpoint.every=0",
        "--config.sample.every=0",
    )
    finished = train(tiny, tmp_path / "run", *overrides)
    assert finished.code == 1 and len(finished.err.splitlines()) == 1
    assert "no checkpoint was written yet" in finished.err and "optim.learning_rate" in finished.err
    assert steps(tmp_path / "run") == []


def test_a_full_disk_at_a_save_ends_in_one_line_and_keeps_the_last_checkpoint(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    with largest_file(8192):
        finished = train(tiny, workdir)
    assert finished.code == 1
    assert re.fullmatch(
        r"error: checkpoint in .* could not be written .*; the checkpoint of step 4 is whole; make room.*\n",
        finished.err,
    )
    # In a copy: the writes of the failed save may still be going on, in threads of this process.
    again = shutil.copytree(workdir, tmp_path / "again", ignore=shutil.ignore_patterns("*checkpoint-tmp*"))
    assert train(tiny, again).code == 0
    assert_same_run(again, trained)


def test_a_full_disk_at_a_line_of_metrics_ends_in_one_line(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    with largest_file(600):
        finished = train(tiny, workdir)
    assert finished.code == 1
    assert re.fullmatch(r"error: .* could not be written .*make room and run the same command again\n", finished.err)
    assert train(tiny, workdir).code == 0
    assert_same_run(workdir, trained)


def test_a_second_process_in_the_same_workdir_is_refused(tiny, trained, tmp_path):
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[])
    with open(workdir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = train(tiny, workdir)
    assert finished.code == 1 and "in use by another process" in finished.err


# ---- From Python -----------------------------------------------------------------------------------------------------
# As a notebook calls it: no flags, no process exit, Ctrl-C saves, and no handler is left behind.


@pytest.fixture
def config(tiny, monkeypatch):
    one_device = functools.partial(mesh.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(mesh, "make_mesh", one_device)
    for name, made in running.SHARING.items():
        place, _, attribute = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(place), attribute, made)
    return config_file.read(tiny.removeprefix("--config="), [])


def test_an_interrupted_run_saves_leaves_no_handler_and_resumes_to_the_bit(config, trained, tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        interrupted = Spy(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None)
        patch.setitem(runs.train.__globals__, "abstract_step", interrupted)
        stopped = runs.train(config, tmp_path / "run")
    assert (stopped.stopped_by, stopped.step, stopped.checkpoint.is_dir()) == ("SIGINT", 3, True)
    assert list(stopped.losses) == [1, 2, 3] and list(stopped.eval_losses) == [0, 3]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers

    result = runs.train(config, tmp_path / "run")
    assert (result.stopped_by, result.step) == (None, 6)
    assert_same_run(tmp_path / "run", trained)
    adapter = result.adapter
    assert adapter.step == 6 and adapter.lora == config.lora
    assert runs.train(config, tmp_path / "run").losses == result.losses  # complete: nothing is trained


def test_a_run_in_another_thread_needs_no_signals(config, trained, tmp_path):
    results = []
    workdir = without_checkpoints(trained, tmp_path / "run", gone=[6])
    thread = threading.Thread(target=lambda: results.append(runs.train(config, workdir)))
    thread.start()
    thread.join()
    assert results[0].step == 6
    assert_same_run(workdir, trained)


def test_a_config_built_in_python_is_checked_before_a_run(tmp_path):
    wrong = dataclasses.replace(Config(), train=TrainConfig(steps=0), dtype="float8")
    with pytest.raises(UserError, match=r"config.train.steps=0 must be at least 1.*config.dtype=float8 must be one of"):
        runs.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- Real signals to real processes ----------------------------------------------------------------------------------


def wait_for_step(process, workdir, step):
    """Until the run has written a line of this step."""
    for _ in range(1200):
        if process.poll() is not None:
            return
        file = workdir / "metrics.jsonl"
        if file.exists() and re.search(f'"step": {step}, "train', file.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError("the run wrote no such line in a minute")


@pytest.mark.slow
def test_processes_stopped_by_sigterm_and_sigkill_end_as_an_uninterrupted_one(tiny, tmp_path):
    longer = (tiny, "--config.train.steps=40", "--config.eval.every=10", "--config.sample.every=0")
    assert running.finish(running.start("train", *longer, f"--workdir={tmp_path / 'whole'}")).code == 0
    workdir, draw = tmp_path / "run", random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        process = running.start("train", *longer, f"--workdir={workdir}")
        done = (
            max((line["step"] for line in running.lines(workdir / "metrics.jsonl")), default=0)
            if workdir.exists()
            else 0
        )
        wait_for_step(process, workdir, done + draw.randint(1, 6))
        time.sleep(draw.random() * 0.2)
        process.send_signal(number)
        finished = running.finish(process)
        assert finished.code == (75 if number == signal.SIGTERM else -signal.SIGKILL), finished
        assert finished.err == ""
    assert running.finish(running.start("train", *longer, f"--workdir={workdir}")).code == 0
    assert_same_run(workdir, tmp_path / "whole", step=40)


@pytest.mark.slow
def test_two_processes_do_not_share_a_workdir(tiny, tmp_path):
    longer = (tiny, "--config.train.steps=400", f"--workdir={tmp_path / 'run'}")
    first = running.start("train", *longer)
    wait_for_step(first, tmp_path / "run", 1)
    second = running.finish(running.start("train", *longer))
    assert second.code == 1 and len(second.err.splitlines()) == 1 and "in use by another process" in second.err
    first.terminate()
    assert running.finish(first).code == 75


def test_what_is_trained_is_what_is_loaded(trained, demo_base):
    """The adapter in the workdir, through `lowrank.load`, is the one in the checkpoint."""
    model = model_lib.load(demo_base, trained)
    loaded, saved = named_leaves({"lora": model.variables["lora"]}), arrays(trained, 6, "adapter")
    assert loaded.keys() == saved.keys()
    assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
