"""Merging, and the folder that a merged model is written into: others load it and compute the same."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_llama
from torch_llama import torch

from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.errors import UserError
from lowrank.weights.base import read_base
from lowrank.weights.merged import merge, verify_huggingface, write_huggingface

IDS = [[1, 5, 9, 13, 2, 0, 39]]


def read(folder, dtype=np.float32):
    """(config, params as numpy arrays)."""
    base = read_base(folder)
    return base.config, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), base.params)


def random_lora(params, targets=TARGETS, rank=3, seed=0) -> dict:
    rng = np.random.default_rng(seed)
    tree = {"layers": {}}
    for block in ("self_attn", "mlp"):
        for target, module in params["layers"][block].items():
            if target in targets:
                layers, rows, columns = module["kernel"].shape
                tree["layers"].setdefault(block, {})[target] = {
                    "lora_a": rng.standard_normal((layers, rows, rank), np.float32),
                    "lora_b": rng.standard_normal((layers, rank, columns), np.float32),
                }
    return tree


def scaled(scale) -> LoraConfig:
    """Settings of the adapters that `random_lora` makes."""
    return LoraConfig(rank=3, alpha=3 * scale)


@pytest.fixture(scope="module")
def model():
    return torch_llama.make()


@pytest.fixture(scope="module")
def base_folder(model, tmp_path_factory):
    return torch_llama.saved(model, tmp_path_factory.mktemp("base"))


def test_merging_adds_the_scaled_product_and_nothing_else(base_folder):
    _, params = read(base_folder)
    lora = random_lora(params, targets=("q_proj", "down_proj"))
    merged = merge(params, lora, scaled(0.5))
    for path in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        factors, kernel = lora["layers"][path[0]][path[1]], params["layers"][path[0]][path[1]]["kernel"]
        wanted = kernel.astype(np.float64) + 0.5 * (factors["lora_a"].astype(np.float64) @ factors["lora_b"])
        found = merged["layers"][path[0]][path[1]].pop("kernel")
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)  # float32 sums of 4 terms of size below 10
        params["layers"][path[0]][path[1]].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_a_zero_lora_b_merges_to_the_base_bit_for_bit(base_folder):
    _, params = read(base_folder, jnp.bfloat16)
    lora = jax.tree.map_with_path(lambda path, x: x * (path[-1].key == "lora_a"), random_lora(params))
    merged = merge(params, lora, scaled(2.0))
    assert jax.tree.map(lambda x: x.dtype.name, merged) == jax.tree.map(lambda x: "bfloat16", params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_a_merged_kernel_is_rounded_once(base_folder):
    """In bfloat16, rounding the delta before adding it gives other digits; so the base is never rounded on the way."""
    _, params = read(base_folder)
    lora = random_lora(params)
    exact, rounded = merge(params, lora, scaled(0.5)), merge(params, lora, scaled(0.5), jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded)} == {"bfloat16"}


def test_arrays_of_jax_and_stored_leaves_merge_the_same(base_folder):
    _, params = read(base_folder)
    lora = random_lora(params)
    wanted = merge(params, lora, scaled(0.25), np.float32)
    stored = merge(read_base(base_folder).params, lora, scaled(0.25), np.float32)
    jaxed = merge(jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, lora), scaled(0.25), np.float32)
    jax.tree.map(np.testing.assert_array_equal, stored, wanted)
    jax.tree.map(np.testing.assert_array_equal, jaxed, wanted)


def test_merging_leaves_its_arguments_alone(base_folder):
    _, params = read(base_folder)
    lora = random_lora(params)
    before = jax.tree.map(np.copy, (params, lora))
    merge(params, lora, scaled(1.0))
    jax.tree.map(np.testing.assert_array_equal, (params, lora), before)


def test_an_adapter_that_does_not_fit_is_refused_with_all_offenders(base_folder):
    _, params = read(base_folder)
    lora = random_lora(params, targets=("q_proj", "v_proj"))
    q = lora["layers"]["self_attn"]["q_proj"]
    q["lora_a"] = q["lora_a"][:2]
    lora["layers"]["cross_attn"] = {"q_proj": q}
    lora["norm"] = lora["head"] = q
    with pytest.raises(UserError) as error:
        merge(params, lora, scaled(1.0))
    assert str(error.value) == (
        "the adapter does not fit the base: head: not in the base; layers/cross_attn: not in the base; "
        "layers/self_attn/q_proj: [2, 24, 3] @ [3, 3, 32] beside a kernel [3, 24, 32]; norm/lora_a: not in the base; "
        "norm/lora_b: not in the base; give the base it was trained on"
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_written(tmp_path, tied, shard_bytes):
    model = torch_llama.make(tied=tied)
    config, params = read(torch_llama.saved(model, tmp_path / "base"))
    write_huggingface(tmp_path / "out", params, config, dtype="float32", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    again = torch_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = torch_llama.state(model), torch_llama.state(again)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    np.testing.assert_array_equal(torch_llama.logits(again, IDS), torch_llama.logits(model, IDS))


def test_a_merged_export_computes_what_the_adapted_model_does(model, base_folder, tmp_path):
    config, params = read(base_folder)
    lora = random_lora(params)
    write_huggingface(tmp_path / "out", merge(params, lora, scaled(0.125)), config, dtype="float32")
    adapted = torch_llama.make()
    torch_llama.add_delta(adapted, lora, 0.125)
    merged = torch_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Two float32 computations of W + delta, which round it differently; logits are of size 10.
    np.testing.assert_allclose(torch_llama.logits(merged, IDS), torch_llama.logits(adapted, IDS), rtol=0, atol=1e-4)
    assert np.abs(torch_llama.logits(merged, IDS) - torch_llama.logits(model, IDS)).max() > 1


def test_shards_are_numbered_bounded_and_indexed(base_folder, tmp_path):
    config, params = read(base_folder)
    write_huggingface(tmp_path / "out", params, config, dtype="float32", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == 3
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all((tmp_path / "out" / name).stat().st_size < 20_000 + 4_000 for name in files)  # 4 kB for the header
    assert read_base(tmp_path / "out").fingerprint == read_base(base_folder).fingerprint


def test_a_written_base_is_in_the_dtype_asked_for_and_says_so(base_folder, tmp_path):
    config, params = read(base_folder)
    write_huggingface(tmp_path / "out", jax.tree.map(jnp.asarray, params), config, dtype="bfloat16")
    written = read_base(tmp_path / "out")
    assert written.config.stored_dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(written.params)} == {"bfloat16"}
    again = torch_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16


def test_what_is_written_is_as_readable_as_any_new_file(base_folder, tmp_path):
    """safetensors makes files that only their owner may read; an export is there to be handed on."""
    config, params = read(base_folder)
    write_huggingface(tmp_path / "out", params, config, dtype="float32")
    (tmp_path / "any").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {(tmp_path / "any").stat().st_mode}


def test_stories260k_is_written_as_it_was_read(shared_data, tmp_path):
    base = read_base(shared_data / "stories260k" / "hf")
    write_huggingface(tmp_path / "out", base.params, base.config, dtype="float32")
    assert read_base(tmp_path / "out").fingerprint == base.fingerprint


def test_an_existing_folder_is_refused_and_an_empty_one_taken(base_folder, tmp_path):
    config, params = read(base_folder)
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full: exists and is not an empty folder; give a new name or remove it"):
        write_huggingface(full, params, config, dtype="float32")
    write_huggingface(empty, params, config, dtype="float32")
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]


def test_no_leaf_is_lost_in_silence(base_folder, tmp_path):
    config, params = read(base_folder)
    params["layers"]["self_attn"]["q_proj"]["bias"] = np.zeros((3, 32), np.float32)
    with pytest.raises(ValueError, match="more or fewer leaves than its config"):
        write_huggingface(tmp_path / "out", params, config, dtype="float32")


def test_a_failure_leaves_nothing_behind(base_folder, tmp_path):
    config, params = read(base_folder)
    params["norm"]["scale"][3] = 1e5  # no float16 is that large
    with pytest.raises(UserError, match=r"model\.norm\.weight: holds infinite or undefined values in float16"):
        write_huggingface(tmp_path / "out", params, config, dtype="float16")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(base_folder, tmp_path):
    config, params = read(base_folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: cannot be written \("):
        write_huggingface(tmp_path / "file" / "out", params, config, dtype="float32")


def test_verification_names_what_differs(base_folder):
    config, params = read(base_folder)
    verify_huggingface(base_folder, params, config)
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] += 1
    params["norm"]["scale"][0] += 1
    with pytest.raises(UserError, match=r"reads back other than .*: layers/mlp/up_proj/kernel\[1\], norm/scale; check"):
        verify_huggingface(base_folder, params, config)
