"""The evaluating command: the training run's own number, whatever the rows look like, and differences with intervals."""

import json
import pathlib

import numpy as np
import pytest
import running

from lowrank import evaluation
from lowrank.errors import UserError
from lowrank.evaluation.loss import estimate_mean
from lowrank.runs.adapter import read_adapter


@pytest.fixture(scope="module")
def base(demo_base):
    return demo_base


@pytest.fixture(scope="module")
def held_out(trained, tmp_path_factory):
    """The ten records that the trained run held out."""
    data = json.loads((trained / "config.json").read_text())["config"]["data"]["train"]
    file = tmp_path_factory.mktemp("held_out") / "held_out.json"
    file.write_text(json.dumps(json.loads(pathlib.Path(data).read_text())[-10:]))
    return file


def run_evaluate(base, data, *arguments, **options):
    return running.run("evaluate", f"--base={base}", f"--data={data}", *map(str, arguments), **options)


def loss_of(finished, name) -> float:
    assert finished.code == 0, finished.err
    (line,) = [line for line in finished.out.splitlines() if line.startswith(f"{name} ") and "perplexity" in line]
    return float(line.split("loss ")[1].split()[0])


def test_the_loss_is_that_of_the_training_run(base, trained, held_out):
    logged = [line["eval/loss"] for line in running.lines(trained / "metrics.jsonl") if "eval/loss" in line]
    finished = run_evaluate(base, held_out, f"--adapter={trained}")
    assert finished.out.startswith("format completion, 64 tokens at most, responses predicted (")
    assert f"{held_out}: 10 examples, " in finished.out
    assert loss_of(finished, trained) == pytest.approx(logged[-1], abs=1e-6)  # six digits are shown
    without = run_evaluate(base, held_out, "--format=completion", "--max_length=64")
    assert loss_of(without, "base") == pytest.approx(logged[0], abs=1e-6)


@pytest.mark.slow
def test_rows_packing_and_devices_do_not_change_the_losses(base, trained, held_out, tmp_path):
    ways = [("--batch_size=16",), ("--batch_size=3",), ("--packing=False", "--batch_size=2"), ("--batch_size=4",)]
    found = []
    for i, flags in enumerate(ways):
        file = tmp_path / f"{i}.jsonl"
        finished = run_evaluate(
            base, held_out, f"--adapter={trained}", f"--to={file}", *flags, devices=8 if i == 3 else 1
        )
        assert finished.code == 0, finished.err
        found.append(running.lines(file))
    assert [line["example"] for line in found[0]] == list(range(10))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one["tokens"] == two["tokens"]
            assert one["loss"] == pytest.approx(two["loss"], rel=2e-6)  # float32, sums of other shapes


def test_the_mean_is_over_tokens_and_a_pair_is_compared_example_by_example(base, trained, held_out, tmp_path):
    finished = run_evaluate(base, held_out, f"--other={trained}", f"--to={tmp_path / 'losses.jsonl'}")
    lines = running.lines(tmp_path / "losses.jsonl")
    tokens = np.array([line["tokens"] for line in lines])
    one, two = (np.array([line[name] for line in lines]) for name in ("loss", "other_loss"))
    assert loss_of(finished, "base") == pytest.approx((one * tokens).sum() / tokens.sum(), abs=1e-6)
    assert loss_of(finished, trained) == pytest.approx((two * tokens).sum() / tokens.sum(), abs=1e-6)
    difference = ((one - two) * tokens).sum() / tokens.sum()
    assert f"base minus {trained}: loss {difference:+.6f} ± " in finished.out
    assert finished.out.splitlines()[4].endswith(f"{trained} is better")
    assert "intervals from 10 examples are too narrow" in finished.out


def test_the_function_gives_the_numbers_that_the_command_prints(base, trained, held_out):
    result = evaluation.evaluate(base, held_out, trained, trained)
    assert result.losses.shape == (2, 10) and result.tokens.shape == (10,)
    assert result.settings.format == "completion" and len(result.examples.examples) == 10
    assert result.loss == result.other_loss and result.difference == (0.0, 0.0)
    earlier = evaluation.evaluate(base, held_out, trained, read_adapter(trained, "last"), step=4)
    assert earlier.other_loss == result.loss != earlier.loss
    with pytest.raises(UserError, match=r"step best is asked for, .* there is no adapter"):
        evaluation.evaluate(base, held_out, step="best")
    printed = run_evaluate(base, held_out, f"--adapter={trained}")
    assert loss_of(printed, trained) == pytest.approx(result.loss.mean, rel=2e-6)  # eight devices here, one there


def test_an_adapter_does_not_differ_from_itself(base, trained, held_out):
    finished = run_evaluate(base, held_out, f"--adapter={trained}", f"--other={trained}")
    assert f"{trained} minus {trained}: loss +0.000000 ± 0.000000, example by example: no difference" in finished.out


def test_the_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        tokens = draw.integers(5, 60, 200).astype(float)
        sums = tokens * (2 + draw.normal(0, 0.5, 200))  # a true mean of 2 a token
        mean, half = estimate_mean(sums, tokens)
        inside += abs(mean - 2) <= half
    assert 930 <= inside <= 970  # 950 expected, a standard deviation of 7


def test_one_example_has_no_interval():
    assert estimate_mean(np.array([6.0]), np.array([3.0])) == (2.0, None)


def test_one_example_has_a_loss_and_no_interval(base, held_out, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(json.loads(held_out.read_text())[:1]))
    finished = run_evaluate(base, tmp_path / "one.json", "--format=completion", "--max_length=64")
    assert finished.code == 0 and "±" not in finished.out and "there is no interval from one example" in finished.out


def test_settings_come_from_the_config_and_flags_go_before_it(base, tiny, held_out, trained):
    from_config = run_evaluate(base, held_out, tiny)
    assert loss_of(from_config, "base") == loss_of(run_evaluate(base, held_out, f"--other={trained}"), "base")
    shorter = run_evaluate(base, held_out, tiny, "--config.data.max_length=32", "--train_on_prompt")
    flags = run_evaluate(base, held_out, "--format=completion", "--max_length=32", "--train_on_prompt")
    assert loss_of(shorter, "base") == loss_of(flags, "base") != loss_of(from_config, "base")


def test_mistakes_get_one_line(base, tiny, trained, held_out, tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    for arguments, said in (
        ((base, held_out, "--max_length=4096"), "max_length=4096 is more than the model reads (512)"),
        ((base, tmp_path / "absent.json"), "absent.json"),
        ((base, held_out, f"--to={tmp_path / 'there.jsonl'}"), "there.jsonl exists; give a new name"),
        ((base, held_out, "--config.data.max_length=9"), "unknown argument --config.data.max_length=9"),
        ((base, held_out, f"--adapter={tmp_path}"), "is neither a workdir"),
        ((base, held_out, f"--to={tmp_path / 'absent' / 'x.jsonl'}"), "its folder does not exist"),
        ((base, held_out, tiny, "--config.dtype=bfloat16"), "--config.dtype=bfloat16 would change nothing"),
    ):
        finished = run_evaluate(*arguments)
        assert (finished.code, finished.err.count("\n")) == (1, 1) and said in finished.err
    finished = running.run("evaluate")
    assert finished.code == 1 and "--base, --data missing" in finished.err
    assert (tmp_path / "there.jsonl").read_text() == "mine"
