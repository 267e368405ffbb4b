"""The exporting command: what it writes computes, in other people's libraries, what was trained here."""

import importlib
import json
import resource
import shutil

import numpy as np
import pytest
import running

import lowrank
import lowrank.data.tokenizer
from lowrank import inference
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError
from lowrank.inference.export import write_ends
from lowrank.weights.base import read_base
from lowrank.weights.convert import convert

IDS = np.random.default_rng(1).integers(3, 512, (2, 24))


@pytest.fixture(scope="module")
def base(demo_base):
    return demo_base


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
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon a time").input_ids
    assert ids == lowrank.load(tmp_path / "out").encode("Once upon a time")
    assert_close(np.asarray(lowrank.load(tmp_path / "out").logits(IDS)), adapted)


def test_the_function_exports_what_the_command_does(base, trained, tmp_path):
    made = inference.export(trained, tmp_path / "function", "peft")
    assert (made.folder, made.dtype, made.difference) == (tmp_path / "function", "float32", 0.0)
    assert export(trained, "peft", tmp_path / "command").code == 0
    contents = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("function", "command")]
    assert contents[0] == contents[1]


def test_a_base_is_opened_once(trained, tmp_path, monkeypatch):
    opened = []

    def count_and_read(folder):
        opened.append(folder)
        return read_base(folder)

    for name in ("export", "model"):
        monkeypatch.setattr(importlib.import_module(f"lowrank.inference.{name}"), "read_base", count_and_read)
    inference.export(trained, tmp_path / "out", "peft")
    assert len(opened) == 1


def test_the_name_of_a_native_base_is_asked_for(base, trained, tmp_path):
    convert(base, tmp_path / "native")
    finished = export(trained, "peft", tmp_path / "unnamed", f"--base={tmp_path / 'native'}")
    assert finished.code == 0 and "is a native base, which others cannot load; base_name says" in finished.err
    finished = export(trained, "peft", tmp_path / "named", f"--base={tmp_path / 'native'}", "--base_name=org/name")
    assert finished.code == 0 and finished.err == ""


def test_the_card_of_an_adapter_says_what_it_is_and_its_code_loads_it(base, trained, adapted, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    assert export(trained, "peft", tmp_path / "my-adapter").code == 0
    card = (tmp_path / "my-adapter" / "README.md").read_text()
    losses = [line["eval/loss"] for line in running.lines(trained / "metrics.jsonl") if "eval/loss" in line]
    for said in (
        "library_name: peft",
        "# my-adapter",
        f"| base | `{base}`, fingerprint `{read_base(base).fingerprint}` |",
        "| adapter | rank 4, alpha 8, scale 2 (standard) |",
        "| targets | q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj |",
        "| trained parameters | 38,912 |",
        "| data | `data.json`, sha256 begins `",
        "| data format | completion, 64 tokens at most, loss on responses |",
        "| steps | 6 of 4 rows of packed examples |",
        f"| held out | {losses[0]:.4f} (step 0) | {losses[-1]:.4f} (step 6) |",
        "the largest difference was 0 of the largest logit (allowed for float32: 0.0001)",
        "--max-lora-rank 8 --lora-modules my-adapter=my-adapter",
        f"python -m lowrank.generate --base={base} --adapter=my-adapter --format=completion --prompt=TEXT",
    ):
        assert said in card
    assert "base_model:" not in card  # it is a path here, which the hub would refuse
    monkeypatch.chdir(tmp_path)
    code = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec("\n".join(line for line in code.splitlines() if "okenizer =" not in line), names)
    assert_close(torch_logits(names["model"].float().eval()), adapted)


def test_the_card_of_a_merged_model_names_the_base_as_told(trained, tmp_path):
    finished = export(
        trained, "merged", tmp_path / "out", "--dtype=bfloat16", "--base_name=someone/stories", "--step=4"
    )
    assert finished.code == 0, finished.err
    difference = finished.out.split("logits within ")[1].split()[0]
    assert 0 < float(difference) < 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "library_name: transformers",
        "base_model: someone/stories",
        "With a LoRA adapter merged into it: `someone/stories`",
        "| steps | 4 of 4 rows",
        "python -m lowrank.generate --base=out --format=completion --prompt=TEXT",
        f"the largest difference was {difference} of the largest logit (allowed for bfloat16: 0.05)",
    ):
        assert said in card
    assert "(step 6)" not in card


def test_what_ends_a_turn_stands_in_the_generation_config(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.markers["<|im_end|>"] = 7
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 9}')
    write_ends(tmp_path, read_base(base).config, tokenizer)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"temperature": 0.5, "eos_token_id": [7, tokenizer.eos_id, 9]}


def test_tokenizer_chat_template_and_generation_config_come_along(base, trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    richer = shutil.copytree(base, tmp_path / "base", copy_function=shutil.copyfile)
    (richer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (richer / "generation_config.json").write_text('{"temperature": 0.5}')
    (richer / "training_args.bin").write_text("not for others")
    assert export(trained, "merged", tmp_path / "out", f"--base={richer}").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert lowrank.load(tmp_path / "out").tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.slow
def test_a_run_with_a_tokenizer_of_its_own_hands_that_on(tiny, demo_base, tmp_path):
    """Its EOS and BOS, too: a model that is told the base's would never stop."""
    import sentencepiece

    corpus = [x["output"] for x in json.loads((demo_base.parent / "instructions.json").read_text())[:2000]]
    (tmp_path / "own").mkdir()
    with open(tmp_path / "own" / "tokenizer.model", "wb") as file:
        options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
        ids = {"bos_id": 0, "eos_id": 1, "unk_id": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=file, **options, **ids)
    flags = (f"--config.tokenizer={tmp_path / 'own'}", "--config.sample.every=0")
    finished = running.run("train", tiny, f"--workdir={tmp_path / 'run'}", *flags)
    assert finished.code == 0, finished.err
    for form in ("merged", "peft"):
        assert export(tmp_path / "run", form, tmp_path / form).code == 0
    merged = lowrank.load(tmp_path / "merged")
    assert (merged.model.config.bos_id, merged.model.config.eos_ids) == (0, (1,))
    expected = lowrank.data.tokenizer.load_tokenizer(tmp_path / "own").encode("Hello  there")
    assert merged.tokenizer.encode("Hello  there") == expected
    card = (tmp_path / "peft" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("peft")' in card and "| tokenizer | its own, in this folder |" in card
    assert (tmp_path / "peft" / "tokenizer.model").is_file()


def test_the_current_folder_can_be_the_target(trained, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finished = export(trained, "peft", ".")
    assert finished.code == 0, finished.err
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    assert "\n# here\n" in (tmp_path / "here" / "README.md").read_text()
    finished = export(trained, "peft", tmp_path / ("x" * 300))
    assert finished.code == 1 and finished.err.count("\n") == 1 and "cannot be written" in finished.err


def test_a_dtype_for_an_adapter_is_refused(trained, tmp_path):
    finished = export(trained, "peft", tmp_path / "out", "--dtype=bfloat16")
    assert finished.code == 1 and "dtype=bfloat16 is for format=merged" in finished.err


def test_an_earlier_step_is_exported(trained, tmp_path):
    assert export(trained, "peft", tmp_path / "early", "--step=3").code == 0
    assert export(trained, "peft", tmp_path / "late").code == 0
    early, late = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("early", "late"))
    assert early != late


def test_a_full_fine_tuning_is_exported_whole(base, full, tmp_path):
    transformers = pytest.importorskip("transformers")
    finished = export(full, "merged", tmp_path / "out")
    assert finished.code == 0, finished.err
    assert f"A full training of `{base}` on `data.json`" in (tmp_path / "out" / "README.md").read_text()
    expected = np.asarray(lowrank.load(base, full).logits(IDS))
    assert not np.allclose(expected, lowrank.load(base).logits(IDS))
    assert_close(torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_a_full_fine_tuning_has_no_adapter_to_export(full, tmp_path):
    finished = export(full, "peft", tmp_path / "out")
    assert finished.code == 1 and "is a full fine-tuning: there is no adapter; use format=merged" in finished.err


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


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, form):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may grow beyond it: how a full disk feels
    try:
        finished = export(trained, form, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finished.code == 1 and finished.err.count("\n") == 1
    assert f"{tmp_path / 'out'}: cannot be written (" in finished.err
    assert "free some space or give another place" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_step_lists_the_steps_there_are(trained, tmp_path):
    finished = export(trained, "peft", tmp_path / "out", "--step=5")
    assert finished.code == 1 and "has no checkpoint of step 5; it has those of steps 3, 4, 6" in finished.err


def test_an_export_that_computes_something_else_is_removed(trained, tmp_path, monkeypatch):
    module = importlib.import_module("lowrank.inference.export")
    monkeypatch.setattr(module, "fixed_logits", lambda *_: np.array([np.nan]))
    with pytest.raises(UserError, match="did not compute what was trained and is removed"):
        module.export(trained, tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []
