"""The config: what a file and the command line may say, and every mistake answered by name, all of them at once."""

import ast
import json
import pathlib
import runpy

import ml_collections
import pytest

from lowrank import config as config_lib
from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.cli.config_file import read
from lowrank.config import Config, DataConfig, TrainConfig, check, from_values, to_dict
from lowrank.errors import UserError
from lowrank.sweeping import grid

ROOT = pathlib.Path(__file__).parents[1]
LEAST = "import ml_collections\ndef get_config(argument=None):\n    c = ml_collections.ConfigDict()\n"
LEAST += "    c.train = ml_collections.ConfigDict()\n    c.train.steps = 10\n"


@pytest.fixture
def write(tmp_path):
    """Write a config file that sets the least there is, and these lines -> its path."""

    def write(*lines, text=None):
        file = tmp_path / "c.py"
        file.write_text(text or LEAST + "".join(f"    {line}\n" for line in lines) + "    return c\n")
        return str(file)

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as refused:
        read(path, list(overrides))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


# ---- What may be said ------------------------------------------------------------------------------------------------


def test_what_a_file_leaves_out_has_the_defaults_of_the_contract(write):
    c = read(write(), [])
    assert c == Config(train=TrainConfig(steps=10))
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout, c.lora.targets, c.lora.scaling) == (
        16,
        32,
        0,
        TARGETS,
        "standard",
    )
    assert (c.data.format, c.data.max_length, c.data.packing, c.data.shuffle) == ("auto", 512, True, True)
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.clip_norm, c.optim.eps) == (2e-4, "constant", 1.0, 1e-8)
    assert (c.optim.b1, c.optim.b2, c.optim.warmup_steps, c.optim.weight_decay) == (0.9, 0.999, 0, 0.0)
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (-1, 1, 1)
    assert (c.dtype, c.param_dtype, c.remat, c.seed) == ("bfloat16", "bfloat16", "none", 0)
    assert c.train.microbatches == 1 and c.train.mode == "lora"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lora.rank", "8", 8),
        ("lora.alpha", "4", 4.0),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("train.epochs", "0.5", 0.5),
        ("data.packing", "False", False),
        ("data.packing", "false", False),
        ("data.train_on_prompt", "True", True),
        ("train.steps", "None", None),
        ("data.seed", "none", None),
        ("base", "", None),
        ("base", "None", None),
        ("base", "a/b=c d", "a/b=c d"),
        ("base", "123", "123"),
        ("log.wandb", "lora", "lora"),
        ("mesh.fsdp", "-1", -1),
        ("lora.targets", "q_proj", ("q_proj",)),
        ("lora.targets", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("lora.targets", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.targets", "('q_proj','v_proj')", ("q_proj", "v_proj")),
        ("lora.targets", '["q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("lora.targets", "('q_proj',)", ("q_proj",)),
        ("lora.targets", "all", TARGETS),
        ("lora.targets", "attention", TARGETS[:4]),
        ("lora.targets", "mlp,q_proj", (*TARGETS[4:], "q_proj")),
        ("lora.init", "a_zero", "a_zero"),
        ("optim.warmup_ratio", "0.03", 0.03),
        ("sample.prompts", "", ()),
        ("sample.prompts", "Hello (you)", ("Hello (you)",)),
        ("sample.prompts", "['One, two', 'three']", ("One, two", "three")),
    ],
)
@pytest.mark.parametrize("spaced", [False, True])
def test_overrides_of_every_kind(write, key, text, value, spaced):
    """On keys that the file leaves out, as --config.key=value and as --config.key value."""
    flags = [f"--config.{key}", text] if spaced else [f"--config.{key}={text}"]
    found = get(read(write("c.train.epochs = 1.0", "c.mesh = {'data': 1}"), flags), key)
    assert found == value and type(found) is type(value)


UNEVEN = (("q_proj", (8, 8, 4, 0)), ("down_proj", (32,)))


@pytest.mark.parametrize(
    "override",
    [
        "--config.lora.ranks={'down_proj': 32, 'q_proj': (8, 8, 4, 0)}",
        "--config.lora.ranks=[['q_proj', [8, 8, 4, 0]], ['down_proj', [32]]]",
    ],
)
def test_ranks_that_differ_are_a_table_of_targets(write, override):
    assert read(write(), [override]).lora.ranks == UNEVEN
    in_file = read(write("c.lora = dict(ranks={'down_proj': 32, 'q_proj': (8, 8, 4, 0)}, alphas={'q_proj': 2})"), [])
    assert in_file.lora.ranks == UNEVEN and in_file.lora.alphas == (("q_proj", (2.0,)),)
    assert (
        read(write(), ["--config.lora.ranks.q_proj=(8, 8, 4, 0)", "--config.lora.ranks.down_proj=32"]).lora.ranks
        == UNEVEN
    )
    assert from_values(json.loads(json.dumps(to_dict(in_file)))) == in_file


def test_an_override_goes_before_the_file_and_the_last_one_before_the_others(write):
    path = write("c.lora = ml_collections.ConfigDict({'rank': 4, 'targets': ['q_proj']})")
    assert read(path, []).lora.rank == 4 and read(path, []).lora.targets == ("q_proj",)
    c = read(path, ["--config.lora.rank=8", "--config.lora.rank=2"])
    assert c.lora.rank == 2 and c.lora.targets == ("q_proj",)


def test_an_argument_of_the_file_is_handed_on(write):
    path = write("c.seed = int(argument)")
    assert read(f"{path}:7", []).seed == 7


def test_steps_win_over_epochs_where_both_are_set(write):
    c = read(write("c.train.epochs = 3.0"), [])
    assert (c.train.steps, c.train.epochs) == (10, 3.0)  # the command takes `steps or epochs`: see test_train.py


def test_a_config_survives_its_way_through_the_workdir(write):
    c = read(write("c.lora = {'targets': ('q_proj', 'o_proj')}", "c.sample = {'prompts': ('a', 'b')}"), [])
    assert from_values(to_dict(c)) == c


CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
ARGUMENTS = ["llama3.py:70b", "llama3.py:405b", "rank_ablation.py:targets", "rank_ablation.py:batch"]


@pytest.mark.parametrize("name", [*CONFIGS, *ARGUMENTS])
def test_every_config_of_the_project_is_read_and_says_how_it_is_run(name):
    path = ROOT / "configs" / name.split(":")[0]
    sweeps = "config.sweep" in path.read_text()
    file = str(path.parent / name)
    configs = [member.config for member in grid.read(file, []).members] if sweeps else [read(file, [])]
    assert configs and all(isinstance(config, Config) for config in configs)
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    # The command that runs it.
    assert f"python -m lowrank.{'sweep' if sweeps else 'train'} --config=configs/{path.name}" in docstring


def test_the_sizes_of_llama3_have_their_own_values():
    found = {size: read(f"{ROOT / 'configs' / 'llama3.py'}:{size}", []) for size in ("8b", "70b", "405b")}
    assert [(c.architecture, c.train.epochs, c.train.microbatches, c.optim.learning_rate) for c in found.values()] == [
        ("llama3-8b", 3.0, 2, 2e-4),
        ("llama3-70b", 1.0, 1, 1e-4),
        ("llama3.1-405b", 1.0, 1, 5e-5),
    ]
    assert "there is no size 7b; choose one of 8b, 70b, 405b" in refusal(f"{ROOT / 'configs' / 'llama3.py'}:7b")


def test_a_config_built_in_python_is_checked_like_a_file():
    built = Config(base="b", data=DataConfig(train="f"), train=TrainConfig(steps=10), lora=LoraConfig(alpha=8))
    assert check(built) == built and isinstance(check(built).lora.alpha, float)
    wrong = Config(lora=LoraConfig(rank=0), train=TrainConfig(batch_size=3, microbatches=2), dtype="float16")
    with pytest.raises(UserError) as refused:
        check(wrong)
    for said in ("config.lora.rank=0 must", "config.train.batch_size=3 must", "config.dtype=float16", "epochs must"):
        assert said in str(refused.value)
    with pytest.raises(UserError, match=r"config.lora.rank=4.0 is not a whole number"):
        check(Config(lora=LoraConfig(rank=4.0), train=TrainConfig(steps=1)))


def test_a_configdict_becomes_a_config_in_python():
    values = ml_collections.ConfigDict(
        {"train": {"steps": 3}, "lora": {"targets": ("q_proj",), "ranks": {"q_proj": 2}}}
    )
    assert from_values(values).lora.ranks == (("q_proj", (2,)),)
    values.sweep = ml_collections.ConfigDict({"seed": (0, 1)})
    with pytest.raises(UserError, match=r"config.sweep is set, but this is one run"):
        from_values(values)


def test_a_key_is_set_in_nested_dicts_and_not_below_a_value():
    values = {"lora": {"rank": 4}}
    config_lib.set_key(values, "lora.alpha", 8.0)
    config_lib.set_key(values, "optim.eps", 1e-6)
    assert values == {"lora": {"rank": 4, "alpha": 8.0}, "optim": {"eps": 1e-6}}
    with pytest.raises(UserError, match=r"config.lora.rank.deep is no key: config.lora.rank holds a value, not keys"):
        config_lib.set_key(values, "lora.rank.deep", 1)


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_all_offenders_are_named_at_once(write):
    path = write("c.lora = {'rnak': 4, 'alpha': 'much'}", "c.learning_rate = 1.0")
    text = refusal(path, "--config.data.packing=maybe", "--config.lora=4", "--config.seed.x=1")
    for offender in ("config.data.packing=maybe is not True or False", "config.learning_rate is no config key"):
        assert offender in text
    assert "config.lora" in text


def test_all_bad_values_are_named_at_once(write):
    flags = ("lora.rank=0", "lora.dropout=1", "train.batch_size=5", "train.microbatches=2", "optim.b1=1", "seed=-1")
    text = refusal(write(), *(f"--config.{flag}" for flag in flags))
    for key in ("lora.rank=0", "lora.dropout=1.0", "train.batch_size=5", "optim.b1=1.0", "seed=-1"):
        assert f"config.{key} must be" in text


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rnak", "config.lora.rank"),
        ("rank", "config.lora.rank"),
        ("learning_rate", "config.optim.learning_rate"),
        ("optimizer.learning_rate", "config.optim.learning_rate"),
        ("train.learningrate", "config.optim.learning_rate"),
        ("data.maxlength", "config.data.max_length"),
        ("bse", "config.base"),
        ("lr", "did you mean config.optim.learning_rate?"),
        ("optim.lr", "config.optim.learning_rate"),
        ("batch_size", "config.train.batch_size"),
        ("per_device_train_batch_size", "config.train.batch_size"),
        ("lora.r", "config.lora.rank"),
        ("lora_alpha", "config.lora.alpha"),
        ("lora.target_modules", "config.lora.targets"),
        ("num_train_epochs", "config.train.epochs"),
        ("model_name_or_path", "config.base"),
        ("warmup_ratio", "config.optim.warmup_ratio"),
        ("data.path", "config.data.train"),
    ],
)
def test_an_unknown_key_says_what_was_meant(write, key, meant):
    assert f"config.{key.split('.')[0]}" in refusal(write(), f"--config.{key}=1")
    assert meant in refusal(write(), f"--config.{key}=1")


def test_others_words_are_no_keys_of_ours_and_mean_ones_that_are():
    keys = config_lib.all_keys()
    words = [word for said in config_lib.OTHERS_WORDS.values() for word in said.split()]
    assert set(config_lib.OTHERS_WORDS) <= set(keys) and len(set(words)) == len(words)
    assert not set(words) & {key.split(".")[-1] for key in keys}


def test_what_contradicts_another_key_is_refused(write):
    flags = ("optim.warmup_ratio=0.1", "optim.warmup_steps=5", "lora.init=a_zero", "init_adapter=runs/a")
    text = refusal(write(), *(f"--config.{flag}" for flag in flags))
    assert "config.optim.warmup_steps and config.optim.warmup_ratio are both set; leave one out" in text
    assert "config.lora.init=a_zero draws new factors, but config.init_adapter has them; leave one out" in text
    assert "must be without repetition" in refusal(write(), "--config.lora.targets=attention,q_proj")


def test_an_unknown_choice_says_what_was_meant(write):
    text = refusal(
        write(), "--config.optim.schedule=cosin", "--config.lora.targets=q_proj,qproj", "--config.remat=some"
    )
    assert "config.optim.schedule=cosin must be one of constant, linear, cosine (did you mean cosine?)" in text
    assert "(qproj matches nothing)" in text
    assert "config.remat=some must be one of" in text
    assert "(did you mean chat?)" in refusal(write(), "--config.data.format=sharegpt")
    assert "(kinds of files are recognized: say auto)" in refusal(write(), "--config.data.format=jsonl")
    columns = "--config.data.columns={'instructoin': 'q'}"
    assert "(instructoin is none) (did you mean instruction?)" in refusal(write(), columns)


@pytest.mark.parametrize(
    ("override", "should"),
    [
        ("lora.rank=4.0", "a whole number"),
        ("lora.rank=four", "a whole number"),
        ("lora.rank=True", "a whole number"),
        ("lora.rank=None", "a whole number"),
        ("lora.alpha=much", "a number"),
        ("optim.learning_rate=1e999", "a number"),
        ("optim.learning_rate=nan", "a number"),
        ("train.epochs=1e999", "a number"),
        ("data.packing=1", "True or False"),
        ("data.packing=yes", "True or False"),
        ("lora.targets=(1, 2)", "a list of strings"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(write, override, should):
    key, _, value = override.partition("=")
    text = refusal(write(), f"--config.{override}")
    assert f"config.{key}=" in text and f" is not {should}" in text and value.strip("(") in text


@pytest.mark.parametrize(
    "line", ["c.lora = {'rank': 4.0}", "c.lora = {'rank': '4'}", "c.lora = {'rank': True}", "c.lora = {'rank': (4, 8)}"]
)
def test_a_file_of_the_wrong_type_is_refused(write, line):
    assert "config.lora.rank=" in refusal(write(line))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--config.train.steps=0"], "config.train.steps=0 must be at least 1"),
        (["--config.train.steps=None"], "config.train.steps or config.train.epochs must be set"),
        (["--config.data.max_length=1"], "config.data.max_length=1 must be at least 2"),
        (["--config.lora.targets="], "config.lora.targets=() must be at least one of q_proj"),
        (["--config.lora.targets=q_proj,q_proj"], "must be without repetition"),
        (["--config.mesh.fsdp=-1"], "only one of config.mesh.data"),
        (["--config.mesh.tensor=0"], "config.mesh.tensor=0 must be"),
        (["--config.data.eval=f", "--config.data.eval_examples=3"], "config.data.eval_examples=3 must be 0 where"),
        (["--config.data.seed=-1"], "config.data.seed=-1 must be"),
        (["--config.seed=4294967296"], "config.seed=4294967296 must be"),
        (["--config.lora.ranks={'x_proj': 3}"], "config.lora.ranks names x_proj, which config.lora.targets does not"),
        (["--config.lora.ranks={'q_proj': -1}"], "must be made of ranks of 0 (no adapter there) or more"),
        (["--config.lora.ranks={'q_proj': 0}"], "must be more than 0 somewhere (q_proj: leave it out of lora.targets)"),
        (["--config.lora.alphas={'q_proj': 0}"], "must be made of alphas above 0"),
        (["--config.lora.ranks={1: 8}"], "is not ranks of targets such as"),
        (["--config.lora.ranks=8"], "is not ranks of targets such as {'down_proj': 32"),
        (["--config.lora.ranks={'q_proj': 1.5}"], "is not ranks of targets such as"),
        (["--config.lora.rank"], "--config.lora.rank has no value; write --config.lora.rank=VALUE"),
        (["--config.lora.rank", "--config.seed=1"], "--config.lora.rank has no value"),
        (["--config.lora.rank.deep=1"], "config.lora.rank"),
        (["--config.sweep.lora.rank=(1,2)"], "config.sweep"),
        (["--confg.lora.rank=1", "extra"], "unknown arguments --confg.lora.rank=1 extra"),
    ],
)
def test_values_that_make_no_sense_are_refused(write, overrides, said):
    assert said in refusal(write(), *overrides)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import ml_collections\n\ndef get_config():\n    return 1 / 0\n",
            "line 4: ZeroDivisionError: division by zero",
        ),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "has no get_config"),
        ("def get_config():\n    return {'lora': 1}\n", "must return an ml_collections.ConfigDict"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "line 2: ValueError"),
        (
            "import ml_collections\ndef get_config():\n    c = ml_collections.ConfigDict()\n"
            "    c.base = ml_collections.config_dict.required_placeholder(str)\n    return c\n",
            "RequiredValueError",
        ),
    ],
)
def test_a_file_that_does_not_work_is_named_with_its_line(write, text, said):
    path = write(text=text)
    with pytest.raises(UserError) as refused:
        read(path, [])
    assert said in str(refused.value) and f"config file {path}" in str(refused.value)


def test_a_missing_file_and_a_missing_flag_are_refused(tmp_path):
    assert f"config file {tmp_path / 'no.py'} is not there" in refusal(f"{tmp_path / 'no.py'}:arg")
    assert "--config is missing" in refusal(None)
    (tmp_path / "c.txt").write_text("")
    assert "is no Python file" in refusal(str(tmp_path / "c.txt"))


def test_data_is_one_place_or_several_with_weights(write):
    file = write()
    assert read(file, ["--config.data.train=a,b.json"]).data.train == "a,b.json"
    flags = ["--config.data.train=('a.json','b.json')", "--config.data.mixture=(3,1)", "--config.data.cache=~/tokens"]
    data = read(file, flags).data
    assert (data.train, data.mixture, data.cache) == (("a.json", "b.json"), (3.0, 1.0), "~/tokens")
    assert from_values(json.loads(json.dumps(to_dict(read(file, flags))))).data == data
    assert "must have a weight for each" in refusal(file, "--config.data.mixture=(1,)", "--config.data.train=a.json")
    assert "must have a weight for each" in refusal(file, flags[0], "--config.data.mixture=(1,2,3)")
    assert "must be made of weights above 0" in refusal(file, flags[0], "--config.data.mixture=(1,0)")
    assert "is not a number" in refusal(file, flags[0], "--config.data.mixture=(1,'x')")
    assert "is not a list of numbers" in refusal(file, flags[0], "--config.data.mixture=3")
    assert "is not a list of strings" in refusal(file, "--config.data.train=(1,2)")
    assert "did you mean config.data.mixture?" in refusal(file, "--config.data.interleave_probs=(1,2)")


def test_the_alpaca_config_spells_out_every_key():
    values = runpy.run_path(str(ROOT / "configs" / "alpaca.py"))["get_config"]()
    assert {key for key, _ in config_lib.flat(config_lib.plain(values))} == set(config_lib.all_keys())


def test_help_lists_every_key_with_its_default_and_what_a_value_must_be():
    lines = config_lib.describe_keys().splitlines()
    shown = [line.strip().partition("=")[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert sorted(shown) == sorted(config_lib.all_keys())
    assert max(map(len, lines)) <= 80
    assert f"  {'lora.rank=16':<30}    at least 1" in lines
    assert f"  {'lora.scaling=standard':<30}    one of standard, rslora" in lines
    assert f"  {'data.mixture=()':<30}    a list of numbers such as (0.7,0.3)" in lines
    assert f"  {'lora.ranks={}':<30}    ranks of targets such as {{'down_proj': 32," in lines
    few = config_lib.describe_keys(("data.max_length", "mesh")).splitlines()
    assert [line.split("=")[0] for line in few if "=" in line[3:] and line.startswith("  ")] == [
        f"  {key}" for key in ("data.max_length", "mesh.data", "mesh.fsdp", "mesh.tensor")
    ]
