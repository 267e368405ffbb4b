"""bench/against_peft.py, end to end on a tiny model, and what it refuses to time."""

import pathlib
import re
import subprocess
import sys

import pytest
import running

BENCH = pathlib.Path(__file__).parents[2] / "bench"


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import turns

    return turns


@pytest.fixture
def work(turns):
    from worker import Work

    return Work(
        folder="", mode="lora", device="cpu", rows=1, length=8, segments=1, trained=1.0, new_tokens=4, dtype="float32",
        learning_rate=1e-3, remat="none", checkpointing=False, held="float32", attention="sdpa",
    )  # fmt: skip


def side(**answers):
    """Answers an order with the next of its answers; the last one stays."""
    return lambda order, **_: answers[order].pop(0) if len(answers[order]) > 1 else answers[order][0]


def trains(*losses):
    steps = [{"seconds": 0.5, "loss": loss} for loss in losses]
    return side(prepare=[{"compiling": 1.0}], peak=[7], step=steps)


@pytest.mark.slow
def test_end_to_end():
    pytest.importorskip("peft")
    done = subprocess.run(
        [sys.executable, BENCH / "against_peft.py", "--shape=tiny", "--rounds=1", "--dtype=float32", "--segments=3", "--trained=0.4"],
        env=running.environment(1),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heads, _, ours, theirs, *remarks = done.stdout.splitlines()
    assert ours.startswith("| tiny, 2 x 64 | lowrank | ")
    assert theirs.startswith("| tiny, 2 x 64 | transformers + PEFT, sdpa, held in float32 | ")
    assert heads.count("|") == ours.count("|") == theirs.count("|") == 10
    apart = re.search(r"losses .* and .*, (\S+) apart; ", remarks[1])
    assert float(apart[1]) < 5e-6  # the same work: in float32 only the order of sums differs


def test_other_work_is_not_timed(turns, work):
    with pytest.raises(SystemExit, match=r"the work is not the same: losses .* 1\.0e-03 apart, at most 1e-04"):
        turns.steps({"lowrank": trains(3.0, 2.0, 1.001), "peft": trains(3.0, 2.0, 1.0)}, work, 1)
    with pytest.raises(SystemExit, match="not the same"):
        turns.steps({"lowrank": trains(3.0, float("nan"), 1.0), "peft": trains(3.0, 2.0, 1.0)}, work, 1)
    with pytest.raises(SystemExit, match="changed too little"):
        turns.steps({"lowrank": trains(3.0001, 3.0, 3.0), "peft": trains(3.0, 3.0, 3.0)}, work, 1)


def test_the_same_work_is_timed_in_turns(turns, work):
    found = turns.steps({"lowrank": trains(3.0, 2.0, 1.0), "peft": trains(3.0, 2.0, 1.00001)}, work, 2)
    assert found["seconds"] == {name: [{"step": 0.5}] * 2 for name in ("lowrank", "peft")}
    assert (found["compiling"], found["first_peak"]) == (1.0, {"lowrank": 7, "peft": 7})


def test_tokens_that_the_other_side_would_not_choose_are_not_timed(turns, work):
    said = {"prefill": 1.0, "decode": 2.0, "tokens": [[1, 2, 3, 4]]}
    sides = {name: side(peak=[7], generate=[said], regret=[0.3]) for name in ("lowrank", "peft")}
    with pytest.raises(SystemExit, match=r"0\.30 standard deviations below"):
        turns.generations(sides, work, 1)


def test_what_a_row_is_made_of(turns, work):
    import dataclasses

    from worker import batch

    found = batch(dataclasses.replace(work, segments=2, trained=0.5, length=10), 100)
    assert found["positions"].tolist() == [[0, 1, 2, 3, 4] * 2]
    assert found["segment_ids"].tolist() == [[1] * 5 + [2] * 5]
    assert found["learnt"].tolist() == [[False, False, False, True, True] * 2]
    whole = batch(work, 100)["learnt"]
    assert whole.tolist() == [[False] + [True] * 7]


def test_flops_needed(turns, work):
    """By hand, of one layer without attention's products: 2 a weight forward, 2 backward, 2 more where it is trained."""
    import dataclasses

    from lowrank.families.config import ModelConfig

    config = ModelConfig(vocab=10, embed=4, mlp=6, layers=1, heads=2, kv_heads=2, head_dim=2)
    base, adapter, attention = 4 * 16 + 3 * 24, 16 * (4 * 8 + 3 * 10), 8 * 8 * 4 * 4
    lora = turns.needed_flops(config, work)
    assert lora == 8 * (4 * base + 6 * adapter + 4 * 40) + 3 * attention
    full = turns.needed_flops(config, dataclasses.replace(work, mode="full"))
    assert full == 8 * (6 * base + 6 * 40) + 3 * attention
    prefill = turns.needed_flops(config, dataclasses.replace(work, mode="generate"))
    assert prefill == 8 * (2 * base + 2 * adapter) + attention + 2 * 40
