"""Which checkpoint of a run is opened, what is said of a better one; a run whose A begins at zero."""

import json
import shutil
import types

import numpy as np
import pytest
import running

import lowrank
from lowrank import inference
from lowrank.config import Config, DataConfig, EvalConfig, TrainConfig
from lowrank.data.examples import Columns, Examples
from lowrank.errors import UserError
from lowrank.runs import report
from lowrank.runs.adapter import read_adapter

IDS = np.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def worse(trained, tmp_path_factory):
    """The finished run, as if it had evaluated best at step 0 and at step 4, and worse at the end."""
    workdir = tmp_path_factory.mktemp("worse") / "run"
    shutil.copytree(trained, workdir)
    losses = {0: 3.5, 4: 2.25, 6: 4.75}
    lines = [{"step": step, "eval/loss": loss} for step, loss in losses.items()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_a_checkpoint_is_named_by_number_best_or_last(worse, tmp_path):
    steps = {None: 6, "last": 6, "best": 4, "4": 4, 4: 4}
    assert {step: read_adapter(worse, step).step for step in steps} == steps
    assert {name: read_adapter(f"{worse}@{name}").step for name in ("best", "last", "4")} == {
        "best": 4,
        "last": 6,
        "4": 4,
    }
    shutil.copytree(worse, tmp_path / "run@best")  # a folder of that name is itself
    assert read_adapter(tmp_path / "run@best").step == 6


def test_a_checkpoint_that_is_not_there_is_one_line(worse, tmp_path):
    exported = tmp_path / "peft"
    inference.export(worse, exported, "peft")
    without = shutil.copytree(worse, tmp_path / "without")
    (without / "metrics.jsonl").write_text("")
    for folder, step, said in (
        (worse, 5, "has no checkpoint of step 5; it has those of steps 3, 4, 6"),
        (worse, "beste", "step beste is no step; give a number, best or last"),
        (f"{worse}@best", "4", "says step best, and --step=4 another"),
        (without, "best", "has no evaluation, which would tell the best step"),
        (exported, "best", "is no workdir: it holds one adapter"),
    ):
        with pytest.raises(UserError) as error:
            read_adapter(folder, step)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_the_end_of_a_run_and_its_export_name_a_better_step(worse, demo_base, tmp_path):
    assert report.best_line(worse) == [
        "best       step 4, eval/loss 2.2500 (the last, step 6: 4.7500); --step=best takes it"
    ]
    finished = running.run("export", f"--workdir={worse}", "--format=peft", f"--to={tmp_path / 'last'}")
    assert finished.out.startswith(
        "step 4 has a lower evaluation loss (2.25) than the exported step 6 (4.75): --step=best exports it\nexported to"
    )
    made = inference.export(worse, tmp_path / "best", "peft", step="best")
    assert (made.step, made.better) == (4, None)
    best, last = (lowrank.load(demo_base, worse, step=step).logits(IDS) for step in ("best", "last"))
    np.testing.assert_array_equal(lowrank.load(demo_base, tmp_path / "best").logits(IDS), best)
    assert not np.array_equal(best, last)


def test_what_a_run_wastes_is_said_before_it_begins():
    def found(kept, cut, dropped, first=0):
        examples = [([1, first + i, 2], [False, True, True], i, i < cut) for i in range(kept)]
        return Examples(Columns.of(examples), dropped)

    fine = types.SimpleNamespace(train=found(100, 10, 1), held_out=found(8, 0, 0, first=100), rows=64)
    steps = TrainConfig(steps=10)
    assert report.costly(Config(train=steps, eval=EvalConfig(every=5)), fine) == []
    wasteful = types.SimpleNamespace(train=found(100, 11, 2), held_out=found(8, 8, 0, first=98), rows=7)
    config = Config(data=DataConfig(max_length=32), train=TrainConfig(epochs=1.0, batch_size=8))
    assert report.costly(config, wasteful) == [
        "11 % of the training examples are cut to 32 tokens and lose their ends: raise config.data.max_length",
        "2 % of the training examples are dropped: their responses are empty, or their prompts fill config.data.max_length",
        "100 % of the held-out examples are cut to 32 tokens and lose their ends: raise config.data.max_length",
        "2 of the 8 held-out examples are training examples, too: eval/loss says little about new ones",
        "8 examples are held out and never evaluated: set config.eval.every",
        "config.train.epochs=1 is less than one batch of 8 rows, which repeats examples: lower config.train.batch_size, "
        "or set config.train.steps",
    ]
    chunks = Config(data=DataConfig(max_length=32, overflow="chunk"), train=steps, eval=EvalConfig(every=5))
    assert (
        report.costly(chunks, types.SimpleNamespace(train=found(9, 9, 0), held_out=None, rows=9)) == []
    )  # nothing is lost


@pytest.mark.slow
def test_a_run_from_a_zero_begins_as_the_base_and_moves_both_factors(tiny, trained, tmp_path):
    own = ("--config.lora.init=a_zero", "--config.sample.every=0", "--config.train.steps=6")
    finished = running.run("train", tiny, f"--workdir={tmp_path / 'run'}", *own)
    assert finished.code == 0, finished.err
    found, expected = (running.metrics(workdir)[0]["eval/loss"] for workdir in (tmp_path / "run", trained))
    assert found == expected  # the base's, to the last bit
    leaves = running.arrays(tmp_path / "run", 6, "adapter")
    assert all(leaf.any() for leaf in leaves.values())
    for form in ("peft", "merged"):
        assert inference.export(tmp_path / "run", tmp_path / form, form).difference < 1e-4
    finished = running.run("analyze", f"--adapter={tmp_path / 'run'}", f"--to={tmp_path / 'analysis'}", "--step=last")
    assert finished.code == 0, finished.err
