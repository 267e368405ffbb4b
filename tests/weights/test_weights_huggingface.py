"""Folders that are not what they claim: each is one line that names every offender."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch_llama
from safetensors.numpy import load_file, save_file
from torch_llama import torch

from lowrank.errors import UserError
from lowrank.families.tensor_names import group_layers
from lowrank.weights.base import read_base


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return torch_llama.saved(torch_llama.make(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory):
    return torch_llama.saved(torch_llama.make(), tmp_path_factory.mktemp("sharded"), max_shard_size="12KB")


@pytest.fixture
def whole(whole_folder, tmp_path):
    return shutil.copytree(whole_folder, tmp_path / "base")


@pytest.fixture
def sharded(sharded_folder, tmp_path):
    return shutil.copytree(sharded_folder, tmp_path / "base")


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        read_base(folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(folder)).removeprefix(": ")


def test_missing_unknown_and_misshapen_tensors_are_one_error(whole):
    def spoil(tensors):
        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((20, 24), np.float32)
        tensors["score.weight"] = np.zeros((2, 24), np.float32)

    change_tensors(whole, spoil)
    assert refusal(whole) == (
        "the tensors do not fit the config: missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "unknown: model.layers.{0,1,2}.self_attn.q_proj.bias, score.weight; "
        "misshapen: model.layers.0.mlp.down_proj.weight is [20, 24] instead of [24, 20]; fetch the folder again"
    )


def test_a_config_of_fewer_layers_leaves_tensors_over(whole):
    change_json(whole / "config.json", lambda fields: fields.update(num_hidden_layers=2))
    assert "unknown: model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight" in refusal(whole)


def test_rotary_frequencies_are_ignored(whole, whole_folder):
    def add(tensors):
        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    change_tensors(whole, add)
    assert read_base(whole).fingerprint == read_base(whole_folder).fingerprint


def test_a_tied_model_may_repeat_its_embedding_as_the_head(tmp_path):
    folder = torch_llama.saved(torch_llama.make(tied=True), tmp_path)
    plain = read_base(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    base = read_base(folder)
    assert jax.tree.structure(base.params) == jax.tree.structure(plain.params)
    assert base.fingerprint == plain.fingerprint


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    folder = torch_llama.saved(torch_llama.make(tied=True), tmp_path)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "tie_word_embeddings is true, but lm_head.weight is not the embedding" in refusal(folder)


def test_an_untied_model_needs_its_head(whole):
    change_tensors(whole, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing: lm_head.weight (where the head is tied, config.json must say" in refusal(whole)


@pytest.mark.parametrize("cut", [0, 7, 100, 20_000])
def test_a_truncated_file_is_named(whole, cut):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(whole).startswith("model.safetensors cannot be read (")


def test_a_pointer_in_place_of_a_file_is_named(whole):
    (whole / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 78464\n")
    assert refusal(whole).startswith("model.safetensors cannot be read (")


def test_a_missing_shard_is_named(sharded):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 3
    for name in files[1:3]:
        (sharded / name).unlink()
    assert refusal(sharded) == (f"{files[1]}, {files[2]} missing, model.safetensors.index.json names them; fetch them")


def test_a_truncated_shard_is_named_without_its_tensors(sharded):
    path = min(sharded.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(sharded).startswith(f"{path.name} cannot be read (")
    assert "the index names" not in refusal(sharded)


def test_an_index_that_differs_from_its_files(sharded):
    one, two, *_ = sorted(path.name for path in sharded.glob("*.safetensors"))

    def spoil(index):
        names = [name for name, file in index["weight_map"].items() if file == one]
        index["weight_map"][names[0]] = two
        index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = two
        del index["weight_map"][names[1]]
        index["names"] = names

    index = sharded / "model.safetensors.index.json"
    change_json(index, spoil)
    moved, dropped, *_ = json.loads(index.read_text())["names"]
    text = refusal(sharded)
    assert f"{moved} is in {one}, the index says {two}" in text
    assert f"{dropped} is in {one}, the index says None" in text
    assert "the index names what no file holds: model.layers.7.mlp.up_proj.weight" in text


def test_a_doubled_tensor_is_named(sharded):
    one, two, *_ = sorted(sharded.glob("*.safetensors"))
    first = load_file(one)
    save_file(load_file(two) | first, two)
    for name in first:
        assert f"{name} is in {one.name} and {two.name}" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: holds no weight_map" in refusal(sharded)


def test_an_index_that_points_outside(sharded):
    text = json.dumps({"weight_map": {"model.norm.weight": "../other/model.safetensors"}})
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "names a file outside its folder" in refusal(sharded)


def test_one_file_and_an_index_are_one_too_many(sharded):
    shutil.copy(min(sharded.glob("*.safetensors")), sharded / "model.safetensors")
    assert refusal(sharded).startswith("has both model.safetensors and model.safetensors.index.json")


def test_other_formats_are_refused_by_name(whole):
    (whole / "model.safetensors").rename(whole / "consolidated.00.pth")
    (whole / "model.gguf").touch()
    assert refusal(whole) == (
        "has no weights: no model.safetensors, pytorch_model.bin or an index of several files (found consolidated.00.pth, "
        "model.gguf, which is not supported); give the folder of a base"
    )


def test_a_folder_of_nothing(whole):
    (whole / "model.safetensors").unlink()
    assert refusal(whole).startswith(
        "has no weights: no model.safetensors, pytorch_model.bin or an index of several files; give"
    )


def test_other_dtypes_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = torch_llama.saved(torch_llama.make(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    text = refusal(folder)
    assert "model.norm.weight is held in F8_E4M3, supported are F32, F16, BF16" in text
    assert "lm_head.weight is held in I8, supported are F32, F16, BF16" in text


def test_names_are_drawn_together():
    names = ["model.layers.0.a", "model.layers.10.a", "model.layers.2.a", "model.layers.2.b", "norm", "x.layers.y"]
    assert group_layers(names) == "model.layers.{0,2,10}.a, model.layers.2.b, norm, x.layers.y"
