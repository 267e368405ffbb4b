"""Every mistake a user can make: exit code 1, one line on stderr that names the thing, and nothing lost.

A case is a function that prepares the mistake in an empty folder and gives the command's words, and what the line must
say. Full disks and refused resumes are in test_train.py, the config's own mistakes in test_config.py.
"""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import running
import safetensors.numpy as numpy_file
import tokenizers

CASES = []


def case(*said: str, command: str = "train", devices: int = 1):
    def register(prepare):
        CASES.append(pytest.param(command, prepare, said, devices, id=prepare.__name__))
        return prepare

    return register


@dataclasses.dataclass
class Given:
    """What a case starts from: an empty folder, the embedded base, the config of a tiny run and its finished workdir."""

    folder: pathlib.Path
    base: pathlib.Path
    tiny: str
    trained: pathlib.Path

    def train(self, *overrides: str) -> list[str]:
        return [self.tiny, f"--workdir={self.folder / 'run'}", *(f"--config.{override}" for override in overrides)]

    def copy(self) -> pathlib.Path:
        copy = shutil.copytree(self.base, self.folder / "base", copy_function=shutil.copyfile)
        copy.chmod(0o755)
        return copy

    def base_with(self, **fields) -> list[str]:
        copy = self.copy()
        config = json.loads((copy / "config.json").read_text()) | fields
        (copy / "config.json").write_text(json.dumps(config))
        return self.train(f"base={copy}")

    def data(self, content: str, name: str = "data.json", form: str = "alpaca") -> list[str]:
        (self.folder / name).write_text(content)
        return self.train(f"data.train={self.folder / name}", f"data.format={form}")


def words_of(given: Given, *words: str) -> list[str]:
    return [f"--base={given.base}", *words]


# ---- Flags and config ------------------------------------------------------------------------------------------------


@case("config.train.microbatches=0 must be at least 1")
def no_microbatches(given):
    return given.train("train.microbatches=0")


@case("is a part of the run", "; name that, --adapter=", command="generate")
def adapter_is_the_folder_of_checkpoints(given):
    return words_of(given, f"--adapter={given.trained / 'checkpoints' / '6'}", "--prompt=a")


@case("--prompt=caf\\xe9: not UTF-8 text", command="generate")
def argument_that_is_no_utf8(given):
    return words_of(given, "--prompt=caf\udce9")


@case("the prompt holds half a character ('\\ud83d')", command="generate")
def prompt_with_half_a_character(given):
    (given.folder / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "cut \\ud83d"}]}\n')
    return words_of(given, f"--prompts={given.folder / 'prompts.jsonl'}")


@case("metrics.jsonl, line 2: not a line of JSON ('utf-8' codec can't decode", command="generate")
def metrics_that_are_no_utf8(given):
    run = shutil.copytree(given.trained, given.folder / "run")
    (run / "metrics.jsonl").write_bytes(b'{"step": 0, "eval/loss": 1.0}\n{"caf\xe9": 1}\n')
    return words_of(given, f"--adapter={run}", "--step=best", "--prompt=a")


@case("--config is missing")
def no_config(given):
    return []


@case("--workdir is missing")
def no_workdir(given):
    return [given.tiny]


@case("config.lora.rnak is no config key; did you mean config.lora.rank?")
def mistyped_key(given):
    return given.train("lora.rnak=4")


@case("config.lora.rank=four is not a whole number")
def mistyped_value(given):
    return given.train("lora.rank=four")


@case("unknown argument --wrokdir=x")
def mistyped_flag(given):
    return [*given.train(), "--wrokdir=x"]


@case("unknown argument stray")
def stray_word(given):
    return [*given.train(), "stray"]


@case("--dry_run", "see --help")
def flag_of_the_wrong_type(given):
    return [*given.train(), "--dry_run=perhaps"]


@case("config.base is missing; say --config.base=DIR")
def no_base(given):
    return given.train("base=None")


@case("config.data.train is missing; say --config.data.train=FILE")
def no_data(given):
    return given.train("data.train=None")


@case("config.base is missing")
def alpaca_config_as_it_is(given):
    return [f"--config={running.ROOT / 'configs' / 'alpaca.py'}", f"--workdir={given.folder / 'run'}"]


@case("config.architecture=tiny is not one of")
def unknown_architecture(given):
    return given.train("base=None", "architecture=tiny", "train.mode=full", "tokenizer=x")


@case("is no demo, which config.architecture says it is: layers is 3, not 4")
def architecture_of_another_base(given):
    smaller = running.without_last_layer(given.base, given.folder / "base")
    return given.train(f"base={smaller}", "architecture=demo")


@case("config.base is missing; say --config.base=DIR")
def architecture_without_base(given):
    return given.train("base=None", "architecture=demo")


# ---- The base and its tokenizer --------------------------------------------------------------------------------------


@case("no_such_base: no such folder")
def base_missing(given):
    return given.train(f"base={given.folder / 'no_such_base'}")


@case("config.json: not found")
def base_without_config(given):
    (given.copy() / "config.json").unlink()
    return given.train(f"base={given.folder / 'base'}")


@case("config.json: cannot be read as JSON")
def base_with_broken_config(given):
    (given.copy() / "config.json").write_text("{")
    return given.train(f"base={given.folder / 'base'}")


@case('model_type "gpt2"', "is not supported; supported: llama")
def base_of_another_family(given):
    return given.base_with(model_type="gpt2")


@case("partial_rotary_factor")
def base_with_an_unsupported_field(given):
    return given.base_with(partial_rotary_factor=0.5)


@case("missing, model.safetensors.index.json names them")
def base_with_a_missing_shard(given):
    copy = given.copy()
    tensors = numpy_file.load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + ('norm' in name)}-of-00002.safetensors" for name in tensors}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return given.train(f"base={given.folder / 'base'}")


@case("model.safetensors cannot be read", "truncated or corrupt")
def base_that_is_truncated(given):
    os.truncate(given.copy() / "model.safetensors", 500_000)
    return given.train(f"base={given.folder / 'base'}")


@case("has no weights: no model.safetensors, pytorch_model.bin or")
def base_without_weights(given):
    (given.copy() / "model.safetensors").unlink()
    return given.train(f"base={given.folder / 'base'}")


@case("has neither tokenizer.json nor tokenizer.model")
def tokenizer_missing(given):
    (given.copy() / "tokenizer.model").unlink()
    return given.train(f"base={given.folder / 'base'}")


@case("tokenizer.model")
def tokenizer_broken(given):
    (given.copy() / "tokenizer.model").write_bytes(b"no tokenizer")
    return given.train(f"base={given.folder / 'base'}")


@case("has 2000 tokens but the model's vocabulary has 1024")
def tokenizer_too_large(given):
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 2000)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[])).save(str(given.folder / "tokenizer.json"))
    (given.folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return given.train(f"tokenizer={given.folder}")


# ---- The data --------------------------------------------------------------------------------------------------------


@case("data file", "no_such.json cannot be read (No such file or directory)")
def data_missing(given):
    return given.train(f"data.train={given.folder / 'no_such.json'}")


@case("holds no file of data")
def data_is_a_folder(given):
    return given.train(f"data.train={given.folder}")


@case("data.json holds no records")
def data_empty(given):
    return given.data("[]")


@case("data.json holds no records")
def data_of_no_bytes(given):
    return given.data("")


@case("data.json: not valid JSON", "line 1")
def data_broken(given):
    return given.data('[{"instruction": "a", "output": "b"}')


@case("data.jsonl", "line 2: not valid JSON")
def data_with_a_broken_line(given):
    return given.data('{"instruction": "a", "output": "b"}\n{"instruction": "a",\n', name="data.jsonl")


@case("item 2: field 'output' is missing (found: instruction); item 3: field 'instruction' must be text, not a number")
def data_with_missing_and_wrong_fields(given):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"instruction": 1, "output": "b"}]
    return given.data(json.dumps(records))


@case("not UTF-8 text")
def data_in_another_encoding(given):
    (given.folder / "latin.json").write_bytes('[{"instruction": "é", "output": "b"}]'.encode("latin-1"))
    return given.train(f"data.train={given.folder / 'latin.json'}")


@case("all 1 records", "have nothing to learn within data.max_length=64: set a larger one")
def data_all_dropped(given):
    return given.data(json.dumps([{"prompt": "long " * 200, "completion": "b"}]), form="completion")


@case("data.eval_examples=60 leaves nothing to train on")
def data_all_held_out(given):
    return given.train("data.eval_examples=60")


@case("nothing to evaluate on")
def evaluation_without_data(given):
    return given.train("data.eval_examples=0")


@case("config.data.max_length=1 must be at least 2")
def max_length_too_small(given):
    return given.train("data.max_length=1")


@case("config.data.max_length=1024 is more than the model reads (512 positions)")
def max_length_too_large(given):
    return given.train("data.max_length=1024")


# ---- Batch and devices -----------------------------------------------------------------------------------------------


@case("config.train.batch_size=4 must be divisible by microbatches=3")
def batch_and_microbatches(given):
    return given.train("train.microbatches=3")


@case("config.train.batch_size=12", "does not divide over 8 devices", "make it a multiple of 8", devices=8)
def batch_and_devices(given):
    return given.train("train.batch_size=12")


@case("config.train.batch_size=8 in 2 micro-batches does not divide over 8 devices", "a multiple of 16", devices=8)
def microbatches_and_devices(given):
    return given.train("train.batch_size=8", "train.microbatches=2")


@case("mesh: data=3 x fsdp=1 x tensor=1 does not use the 1 devices here exactly")
def mesh_of_other_devices(given):
    return given.train("mesh.data=3")


# ---- The workdir -----------------------------------------------------------------------------------------------------


@case("is not empty and is no run's (no config.json); choose another --workdir")
def workdir_of_somebody_else(given):
    (given.folder / "run").mkdir()
    (given.folder / "run" / "thesis.txt").write_text("years of work")
    return given.train()


@case("holds another run", "config.lora.rank was 4 and is 2", "config.optim.weight_decay was 0.0 and is 0.5")
def workdir_of_another_run(given):
    shutil.copytree(given.trained, given.folder / "run")
    return given.train("lora.rank=2", "optim.weight_decay=0.5")


@case("config.json is not the config.json of a run")
def workdir_with_a_broken_config(given):
    (given.folder / "run").mkdir()
    (given.folder / "run" / "config.json").write_text('{"model_type": "llama"}')
    return given.train()


@case("cannot be written to (Not a directory)")
def workdir_under_a_file(given):
    (given.folder / "file").write_text("")
    return [given.tiny, f"--workdir={given.folder / 'file' / 'run'}"]


@case("cannot be written to (File exists)")
def workdir_is_a_file(given):
    (given.folder / "run").write_text("")
    return given.train()


@case("cannot be written to")
def workdir_where_nobody_may_write(given):
    return [given.tiny, "--workdir=/proc/run"]


# ---- Generating and exporting ----------------------------------------------------------------------------------------


@case("--base is missing", command="generate")
def generate_without_base(given):
    return ["--prompt=x"]


@case("give one of --prompt=TEXT, --prompts=FILE and --chat", command="generate")
def generate_without_prompt(given):
    return words_of(given)


@case("give one of --prompt=TEXT, --prompts=FILE and --chat", command="generate")
def generate_with_two_kinds_of_prompts(given):
    return words_of(given, "--prompt=x", "--chat")


@case("no.txt cannot be read", command="generate")
def prompts_missing(given):
    return words_of(given, f"--prompts={given.folder / 'no.txt'}")


@case("holds no prompt", command="generate")
def prompts_empty(given):
    (given.folder / "p.txt").write_text("\n\n")
    return words_of(given, f"--prompts={given.folder / 'p.txt'}")


@case("p.jsonl has broken records", "line 2", "(found: colour)", command="generate")
def prompts_broken(given):
    (given.folder / "p.jsonl").write_text('{"prompt": "x"}\n{"colour": "x"}\n')
    return words_of(given, f"--prompts={given.folder / 'p.jsonl'}")


@case("p.jsonl has broken records", "line 1", command="generate")
def prompt_of_the_wrong_type(given):
    (given.folder / "p.jsonl").write_text('{"prompt": 5}\n')
    return words_of(given, f"--prompts={given.folder / 'p.jsonl'}")


@case("p.jsonl has broken records", "line 1", command="generate")
def prompt_that_is_no_object(given):
    (given.folder / "p.jsonl").write_text("17\n")
    return words_of(given, f"--prompts={given.folder / 'p.jsonl'}")


@case("top_p=1.5 must be", command="generate")
def top_p_too_large(given):
    return words_of(given, "--prompt=x", "--top_p=1.5")


@case("--temperature", command="generate")
def temperature_below_zero(given):
    return words_of(given, "--prompt=x", "--temperature=-1")


@case("--format=poem", command="generate")
def unknown_format(given):
    return words_of(given, "--prompt=x", "--format=poem")


@case("a prompt of", "leaves no room: the model reads 512", command="generate")
def prompt_too_long(given):
    return words_of(given, f"--prompt={'word ' * 1000}")


@case("unknown argument --config.seed=1", command="generate")
def generate_with_a_config(given):
    return words_of(given, "--prompt=x", "--config.seed=1")


@case("is neither a workdir (no config.json) nor a PEFT folder (no adapter_config.json)", command="generate")
def adapter_missing(given):
    return words_of(given, "--prompt=x", f"--adapter={given.folder / 'no'}")


@case("has no checkpoint; it has none", command="generate")
def adapter_without_a_checkpoint(given):
    shutil.copytree(given.trained, given.folder / "run")
    shutil.rmtree(given.folder / "run" / "checkpoints")
    return words_of(given, "--prompt=x", f"--adapter={given.folder / 'run'}")


@case(
    "does not fit the model",
    "lora/layers/mlp/up_proj/lora_b is (4, 4, 384) there and (2, 4, 100) here",
    command="generate",
)
def adapter_of_another_base(given):
    """The same vocabulary, another shape: every leaf that differs is listed."""
    copy = given.copy()
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "intermediate_size": 100}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor[tuple(slice(0, 100 if size == 384 else size) for size in tensor.shape)]
        for name, tensor in numpy_file.load_file(copy / "model.safetensors").items()
        if not any(f"layers.{layer}." in name for layer in (2, 3))
    }
    numpy_file.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, copy / "model.safetensors")
    return [f"--base={copy}", "--prompt=x", f"--adapter={given.trained}"]


@case("--workdir, --format, --to missing", command="export")
def export_without_flags(given):
    return []


@case("does not hold a run (no config.json)", command="export")
def export_of_no_run(given):
    return [f"--workdir={given.folder}", "--format=peft", f"--to={given.folder / 'out'}"]


@case("--format=gguf", command="export")
def export_in_an_unknown_format(given):
    return [f"--workdir={given.trained}", "--format=gguf", f"--to={given.folder / 'out'}"]


@case("cannot be written", command="export")
def export_to_where_nobody_may_write(given):
    return [f"--workdir={given.trained}", "--format=peft", "--to=/proc/out"]


# ---- The tests -------------------------------------------------------------------------------------------------------


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def given(tmp_path, demo_base, tiny, trained):
    return Given(tmp_path, demo_base, tiny, trained)


def assert_one_line(finished: running.Finished, said):
    assert finished.code == 1
    assert finished.err.startswith("error: ") and finished.err.count("\n") == 1 and finished.err.endswith("\n")
    for words in said:
        assert words in finished.err


@pytest.mark.parametrize(("name", "prepare", "said", "devices"), CASES)
def test_a_mistake_ends_in_one_line_and_loses_nothing(given, name, prepare, said, devices):
    words = prepare(given)
    before = files(given.folder)
    finished = running.run(name, *words, devices=devices)
    assert_one_line(finished, said)
    after = files(given.folder)
    after.pop("run/.lock", None)  # of a run's own workdir
    before.pop("run/.lock", None)
    assert after == before


@pytest.mark.parametrize(
    ("name", "prepare", "said"),
    [
        ("train", mistyped_key, "did you mean config.lora.rank?"),
        pytest.param("generate", prompts_missing, "cannot be read", marks=pytest.mark.slow),
        pytest.param("export", export_without_flags, "--workdir, --format, --to missing", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_in_a_process_of_its_own_ends_in_one_line(given, name, prepare, said):
    assert_one_line(running.finish(running.start(name, *prepare(given))), [said])
