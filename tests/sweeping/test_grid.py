"""What a sweep's members are: the product of what is swept, by name, and what they have in common."""

import pytest

from lowrank.errors import UserError
from lowrank.sweeping import grid

CONFIG = """
import ml_collections


def get_config():
    return ml_collections.ConfigDict({
        "base": "b",
        "data": {"train": "d"},
        "train": {"steps": 6},
        "seed": 7,
        "sweep": SWEEP,
    })
"""


@pytest.fixture
def read(tmp_path):
    def read(sweep, *overrides):
        (tmp_path / "config.py").write_text(CONFIG.replace("SWEEP", repr(sweep)))
        return grid.read(str(tmp_path / "config.py"), [f"--config.{override}" for override in overrides])

    return read


def names(found):
    return [member.name for member in found.members]


def test_members_are_the_product_in_the_configs_order_whatever_order_the_grid_has(read):
    found = read({"seed": (0, 1), "optim": {"learning_rate": (1e-4, 3e-3)}, "lora": {"rank": (1, 16)}})
    assert found.keys == ("lora.rank", "optim.learning_rate", "seed")
    assert names(found) == [
        *("rank=1,learning_rate=0.0001,seed=0", "rank=1,learning_rate=0.0001,seed=1"),
        *("rank=1,learning_rate=0.003,seed=0", "rank=1,learning_rate=0.003,seed=1"),
        *("rank=16,learning_rate=0.0001,seed=0", "rank=16,learning_rate=0.0001,seed=1"),
        *("rank=16,learning_rate=0.003,seed=0", "rank=16,learning_rate=0.003,seed=1"),
    ]
    last = found.members[-1]
    assert last.swept == {"lora.rank": 16, "optim.learning_rate": 3e-3, "seed": 1}
    assert (last.config.lora.rank, last.config.optim.learning_rate, last.config.seed) == (16, 3e-3, 1)
    assert len(grid.group_members(found.members)) == 1


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("sweep.lora.rank=(1,4,16)", [1, 4, 16]),
        ("sweep.lora.rank=1,4,16", [1, 4, 16]),
        ("sweep.lora.rank=[1,4,16]", [1, 4, 16]),
        ("sweep.lora.rank=8", [8]),
        ("sweep.lora.scaling=standard,rslora", ["standard", "rslora"]),
        ("sweep.lora.scaling=('standard','rslora')", ["standard", "rslora"]),
        ("sweep.optim.schedule=(linear,cosine)", ["linear", "cosine"]),
        ("sweep.optim.learning_rate=(0.001,0.0010000001)", [0.001, 0.0010000001]),
        ("sweep.lora.targets=('q_proj,v_proj','up_proj')", [("q_proj", "v_proj"), ("up_proj",)]),
        ("sweep.lora.targets=(('q_proj','v_proj'),('up_proj',))", [("q_proj", "v_proj"), ("up_proj",)]),
        ("sweep.optim.learning_rate=(1e-4,1)", [1e-4, 1.0]),
        ("sweep.data.packing=true,false", [True, False]),
        ("sweep.lora.ranks=({'up_proj':8},{})", [(("up_proj", (8,)),), ()]),
        ("sweep.tokenizer=(None,'there')", [None, "there"]),
    ],
)
def test_values_on_the_command_line(read, override, values):
    found = read({}, override)
    (key,) = found.keys
    assert [member.swept[key] for member in found.members] == values
    assert len({*names(found)}) == len(values)


def test_the_command_line_replaces_and_extends_the_files_grid(read):
    found = read({"lora": {"rank": (1, 2)}}, "sweep.lora.rank=(4,8)", "sweep.seed=(0,1)", "lora.alpha=8")
    assert names(found) == ["rank=4,seed=0", "rank=4,seed=1", "rank=8,seed=0", "rank=8,seed=1"]
    assert {member.config.lora.alpha for member in found.members} == {8.0}


def test_the_order_of_data_is_one_for_all_seeds_unless_it_is_swept_itself(read):
    found = read({"seed": (3, 4, 5)})
    assert [member.config.data.seed for member in found.members] == [3, 3, 3]
    assert [m.config.data.seed for m in read({"seed": (3, 4)}, "data.seed=9").members] == [9, 9]
    found = read({"seed": (3, 4), "data": {"seed": (0, 1)}})
    assert names(found) == ["data.seed=0,seed=3", "data.seed=0,seed=4", "data.seed=1,seed=3", "data.seed=1,seed=4"]
    assert [len(members) for members in grid.group_members(found.members)] == [2, 2]
    assert read({"lora": {"rank": (1, 2)}}).members[0].config.data.seed == 7


def test_what_means_nothing_in_full_fine_tuning_makes_no_members_of_it(read):
    sweep = {
        "lora": {"rank": (1, 2)},
        "train": {"mode": ("lora", "full")},
        "optim": {"learning_rate": (1e-3, 1e-4)},
        "seed": (0, 1),
    }
    found = read(sweep)
    assert len(found.members) == 8 + 2 and found.repeated == 6
    full = [member for member in found.members if member.config.train.mode == "full"]
    assert [member.name for member in full] == ["mode=full,learning_rate=0.001", "mode=full,learning_rate=0.0001"]
    assert full[0].swept == {"train.mode": "full", "optim.learning_rate": 1e-3}
    assert [len(members) for members in grid.group_members(found.members)] == [8, 2]


def test_a_seed_matters_where_a_model_is_trained_from_scratch(read):
    found = read({"seed": (0, 1)}, "train.mode=full", "base=None", "architecture=demo", "tokenizer=t")
    assert names(found) == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lora.rank", (1, 2)),
        ("lora.alpha", (8.0, 16.0)),
        ("lora.dropout", (0.0, 0.1)),
        ("lora.scaling", ("standard", "rslora")),
        ("lora.init", ("default", "a_zero")),
        ("lora.ranks", ({"q_proj": 3}, {})),
        ("optim.learning_rate", (1e-3, 1e-4)),
        ("optim.schedule", ("linear", "cosine")),
        ("optim.warmup_steps", (0, 2)),
        ("optim.weight_decay", (0.0, 0.1)),
        ("optim.clip_norm", (0.0, 1.0)),
        ("seed", (0, 1)),
    ],
)
def test_what_members_of_a_group_may_differ_in(read, key, values):
    assert [len(members) for members in grid.group_members(read(nested(key, values)).members)] == [2]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lora.targets", ("q_proj", "up_proj")),
        ("optim.b1", (0.9, 0.8)),
        ("optim.b2", (0.99, 0.999)),
        ("optim.eps", (1e-8, 1e-6)),
        ("train.mode", ("lora", "full")),
        ("train.batch_size", (2, 4)),
        ("train.steps", (2, 4)),
        ("data.max_length", (32, 64)),
        ("data.seed", (0, 1)),
        ("base", ("a", "b")),
        ("dtype", ("float32", "bfloat16")),
        ("remat", ("none", "full")),
    ],
)
def test_what_makes_another_group(read, key, values):
    assert [len(members) for members in grid.group_members(read(nested(key, values)).members)] == [1, 1]


def nested(key, values):
    for part in reversed(key.split(".")):
        values = {part: values}
    return values


@pytest.mark.parametrize(
    ("sweep", "overrides", "message"),
    [
        ({}, (), "config.sweep is empty; name what to try, --config.sweep.lora.rank='(1,4,16)'"),
        ({"lora": {"rnk": (1, 2)}}, (), "config.sweep.lora.rnk is no config key; did you mean config.sweep.lora.rank?"),
        ({"rank": (1, 2)}, (), "config.sweep.rank is no config key; did you mean config.sweep.lora.rank?"),
        ({"lora": {"rank": ()}}, (), "config.sweep.lora.rank is empty; give it values, or leave it out"),
        ({}, ("sweep.lora.rank=()",), "config.sweep.lora.rank is empty; give it values, or leave it out"),
        ({"lora": {"rank": (4, 4)}}, (), "config.sweep makes two members of the name rank=4; give each value once"),
        ({"lora": {"targets": ("q_proj,v_proj", "v_proj,q_proj")}}, (), "config.sweep makes two members of the name targets=q_proj+v_proj; give each value once"),
        ({"data": {"eval_examples": (5, 10)}}, (), "config.sweep.data.eval_examples cannot be swept: it has to be the same for all members"),
        ({}, ("sweep.lora.ranks={{'q_proj':4},{'q_proj':8}}",), "config.lora.ranks="),
        ({1: (1, 2)}, (), "config.sweep.1 is no config key"),
        ({"lora": {}}, (), "config.sweep is empty"),
        ({"data": {"train": ("a/x.json", "b/x.json")}}, (), "config.sweep makes two members of the name train=x.json, of values that look alike; change one of them"),
        ({"lora": {"rank": (0, 1.5, 4)}}, (), "config.lora.rank=0 must be at least 1; config.lora.rank=1.5 is not a whole number"),
        ({"lora": {"targets": ("q_prj",)}}, (), "config.lora.targets=('q_prj',) must be a choice of"),
        ({"log": {"every": (1, 2)}}, (), "config.sweep.log.every cannot be swept: it has to be the same for all members; set config.log.every"),
        ({"mesh": {"data": (1, 2)}}, (), "config.sweep.mesh.data cannot be swept"),
        ({"group_size": -1, "seed": (0, 1)}, (), "config.sweep.group_size=-1 must be 0 (chosen) or more"),
        ({"at_once": 1.5, "seed": (0, 1)}, (), "config.sweep.at_once=1.5 is not a whole number"),
        ({}, ("sweep=3",), "config.sweep=3 holds keys, not a value"),
        ({"lora": 3}, (), "config.sweep.lora is no config key"),
        ({"lora": {"rnk": (1,)}, "sed": (0,)}, (), "config.sweep.lora.rnk is no config key; did you mean config.sweep.lora.rank?; config.sweep.sed is no config key; did you mean config.sweep.seed?"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_with_one_line(read, sweep, overrides, message):
    with pytest.raises(UserError) as error:
        read(sweep, *overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_numbers_of_numpy_and_ranges_are_taken(tmp_path):
    text = CONFIG.replace("SWEEP", "{'seed': range(3), 'optim': {'learning_rate': tuple(np.logspace(-4, -3, 2))}}")
    (tmp_path / "config.py").write_text(f"import numpy as np\n{text}")
    found = grid.read(str(tmp_path / "config.py"), [])
    assert [member.swept for member in found.members[:3]] == [
        {"optim.learning_rate": 1e-4, "seed": i} for i in range(3)
    ]


def test_names_of_targets_are_short_and_long_names_are_cut_to_what_a_folder_may_have(read):
    attention, mlp = "q_proj,k_proj,v_proj,o_proj", "up_proj,gate_proj,down_proj"
    found = read({"lora": {"targets": (attention, mlp, f"{attention},{mlp}")}})
    assert names(found) == ["targets=attention", "targets=mlp", "targets=all"]
    found = read({"lora": {"ranks": tuple({"q_proj": tuple(range(100, 150)), "v_proj": n} for n in (1, 2))}})
    assert {len(name) for name in names(found)} == {150} and len({*names(found)}) == 2


def test_a_name_is_a_folder_that_every_system_takes(read):
    found = read({"data": {"train": ("some dir/räte:1.json", "b.json")}})
    assert names(found) == ["train=r_te_1.json", "train=b.json"]
