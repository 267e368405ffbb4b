"""The exporting command: what it writes computes, in other people's libraries, what was trained here."""

import shutil

import numpy as np
import pytest
import running

import lowrank

IDS = np.random.default_rng(1).integers(3, 512, (2, 24))


@pytest.fixture(scope="module")
def base(shared_data):
    return shared_data / "stories260k" / "hf"


@pytest.fixture(scope="module")
def adapted(base, trained):
    """The logits of the trained run."""
    return np.asarray(lowrank.load(base, trained).logits(IDS))


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """The workdir of a full fine-tuning."""
    workdir = tmp_path_factory.mktemp("full") / "run"
    overrides = ("--config.train.mode=full", "--config.train.steps=3", "--config.sample.every=0")
    assert running.run("train", tiny, f"--workdir={workdir}", *overrides).code == 0
    return workdir


def export(workdir, form, to, *arguments):
    return running.run("export", f"--workdir={workdir}", f"--format={form}", f"--to={to}", *arguments)


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def assert_close(found, expected):
    # Float32 on both sides; logits here go up to 20, and PyTorch's sums are taken in another order.
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_an_exported_adapter_computes_the_same_in_peft(base, trained, adapted, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    finished = export(trained, "peft", tmp_path / "out")
    assert finished.code == 0, finished.err
    assert finished.out.startswith(f"exported to {tmp_path / 'out'}; read back, every tensor equal, logits within 0 ")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    without = torch_logits(model)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    assert_close(torch_logits(model), adapted)
    assert np.abs(without - adapted).max() > 0.1  # and it is not that the adapter does nothing


def test_an_exported_merged_model_computes_the_same_in_transformers(trained, adapted, tmp_path):
    transformers = pytest.importorskip("transformers")
    finished = export(trained, "merged", tmp_path / "out", "--dtype=float32")
    assert finished.code == 0, finished.err
    assert_close(torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted)
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    assert_close(np.asarray(lowrank.load(tmp_path / "out").logits(IDS)), adapted)


def test_an_earlier_step_is_exported(trained, tmp_path):
    assert export(trained, "peft", tmp_path / "early", "--step=3").code == 0
    assert export(trained, "peft", tmp_path / "late").code == 0
    early, late = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("early", "late"))
    assert early != late


def test_a_full_fine_tuning_is_exported_whole(base, full, tmp_path):
    transformers = pytest.importorskip("transformers")
    finished = export(full, "merged", tmp_path / "out")
    assert finished.code == 0, finished.err
    expected = np.asarray(lowrank.load(base, full).logits(IDS))
    assert_close(torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_a_full_fine_tuning_has_no_adapter_to_export(full, tmp_path):
    finished = export(full, "peft", tmp_path / "out")
    assert finished.code == 1 and "is a full fine-tuning: there is no adapter; use --format=merged" in finished.err


def test_another_base_is_refused_and_the_same_one_may_lie_elsewhere(base, trained, tmp_path):
    other = shutil.copytree(base, tmp_path / "other", copy_function=shutil.copyfile)
    assert export(trained, "peft", tmp_path / "same", f"--base={other}").code == 0
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(0.123).tobytes())
    finished = export(trained, "merged", tmp_path / "out", f"--base={other}")
    assert finished.code == 1 and f"base {other} has other weights" in finished.err
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_refused_and_left_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for form in ("peft", "merged"):
        finished = export(trained, form, tmp_path / "out")
        assert finished.code == 1 and f"{tmp_path / 'out'}: exists and is not an empty folder" in finished.err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_missing_step_lists_the_steps_there_are(trained, tmp_path):
    finished = export(trained, "peft", tmp_path / "out", "--step=5")
    assert finished.code == 1 and "has no checkpoint of step 5; it has those of steps 3, 4, 6" in finished.err


def test_an_export_that_computes_something_else_is_removed(trained, tmp_path):
    finished = running.run(
        "export",
        f"--workdir={trained}",
        "--format=peft",
        f"--to={tmp_path / 'out'}",
        changes={"fixed_logits": lambda *_: np.array([np.nan])},
    )
    assert finished.code == 1 and "did not compute what was trained and is removed" in finished.err
    assert list(tmp_path.iterdir()) == []
