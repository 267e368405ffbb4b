"""Names on the hub in place of paths, over the fake hub: read as the folders are, and pushed to."""

import dataclasses
import json
import pathlib

import fake_hub
import numpy as np
import pytest
import running

import lowrank
from lowrank import inference
from lowrank.cli import config_file
from lowrank.config import Config
from lowrank.errors import UserError
from lowrank.planning.plan import base_architecture
from lowrank.runs import inputs
from lowrank.runs.adapter import read_init_adapter
from lowrank.weights.base import read_base

IDS = np.random.default_rng(1).integers(3, 512, (2, 24))


@pytest.fixture(scope="module")
def config(tiny) -> Config:
    return config_file.read(tiny.removeprefix("--config="), [])


@pytest.fixture(scope="module")
def hub(tmp_path_factory, demo_base, config):
    with fake_hub.serving(tmp_path_factory.mktemp("hub"), token=fake_hub.TOKEN) as hub:
        hub.put_folder("org/base", demo_base)
        hub.put("org/data", {"train.json": pathlib.Path(config.data.train).read_bytes()}, kind="datasets")
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, trained, tmp_path_factory):
    return inference.export(
        trained, tmp_path_factory.mktemp("push") / "out", "peft", base="org/base@main", push="me/adapter"
    )


def test_a_pushed_adapter_loads_by_its_name_and_computes_what_was_trained(hub, pushed, demo_base, trained):
    found = np.asarray(lowrank.load("org/base", "me/adapter").logits(IDS))
    np.testing.assert_array_equal(found, np.asarray(lowrank.load(demo_base, trained).logits(IDS)))
    files = hub.files("me/adapter")
    assert files.keys() - {".gitattributes"} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("training/config.json", "training/metrics.jsonl"),
    }
    assert pushed.url == f"{hub.address}/me/adapter/commit/{hub.repositories['models/me/adapter'].refs['main']}"
    settings = json.loads(files["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", "main")
    card = files["README.md"].decode()
    assert "base_model: org/base\n" in card and "--base=org/base --adapter=" in card


def test_a_run_reads_names_as_it_reads_folders(hub, pushed, config):
    named = dataclasses.replace(
        config,
        base="org/base",
        init_adapter="me/adapter",
        data=dataclasses.replace(config.data, train="org/data:train"),
    )
    here, there = inputs.prepare(config), inputs.prepare(named)
    assert inputs.identity(config, here) == inputs.identity(named, there)  # so a run may go on under either
    assert there.base.fingerprint == here.base.fingerprint
    assert [list(each.ids) for each in there.train.examples] == [list(each.ids) for each in here.train.examples]
    assert read_init_adapter(named, there.base).lora.rank == config.lora.rank


def test_a_plan_asks_for_the_config_alone(hub, demo_base):
    hub.put_folder("org/planned", demo_base)
    assert base_architecture(Config(base="org/planned")) == read_base(demo_base).config
    assert {name for name in hub.sent if name.startswith("org/planned/")} == {"org/planned/config.json"}
    asked = len(hub.requests)
    assert base_architecture(Config(base="org/other", architecture="llama3-8b")) is None
    assert len(hub.requests) == asked


def test_a_push_that_cannot_succeed_is_refused_before_the_export(hub, trained, tmp_path):
    for options, said in (
        ({"push": "me/other"}, r"others cannot load the base by .*; say base_name=org/name"),
        ({"push": "you/other", "base_name": "org/base"}, "does not allow that with you/other"),
        ({"push": "other", "base_name": "org/base"}, "other is no name on the hub"),
    ):
        with pytest.raises(UserError, match=said):
            inference.export(trained, tmp_path / "out", "peft", **options)
    assert not (tmp_path / "out").exists()


def test_a_command_says_what_is_wrong_with_a_name_in_one_line(hub):
    finished = running.run("generate", "--base=org/nothing", "--prompt=x")
    assert finished.code == 1
    assert finished.err.startswith(
        "error: org/nothing is no file or folder here, and there is no model of that name on "
    )
    assert finished.err.count("\n") == 1
