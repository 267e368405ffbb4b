"""Bases: every tensor of a transformers checkpoint arrives in its place, whole or sharded, and is fingerprinted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_llama
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torch_llama import torch

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.weights import base as base_lib
from lowrank.weights import load as load_lib
from lowrank.weights.base import read_base
from lowrank.weights.fingerprint import samples_of
from lowrank.weights.load import load_params
from lowrank.weights.tensor_file import Tensor


def abstract(base, dtype=jnp.float32, sharding=lambda leaf: None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding(x)), base.params)


def expected(model) -> dict:
    """The tree written out by hand, from torch's state dict."""
    s = torch_llama.state(model)
    layers = range(model.config.num_hidden_layers)

    def stacked(name, change):
        return np.stack([change(s[f"model.layers.{i}.{name}.weight"]) for i in layers])

    def kernel(name):
        return {"kernel": stacked(name, lambda w: w.T)}

    def norm(name):
        return {"scale": stacked(name, lambda w: w)}

    tree = {
        "embed_tokens": {"embedding": s["model.embed_tokens.weight"]},
        "layers": {
            "input_layernorm": norm("input_layernorm"),
            "self_attn": {name: kernel(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "post_attention_layernorm": norm("post_attention_layernorm"),
            "mlp": {name: kernel(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
        },
        "norm": {"scale": s["model.norm.weight"]},
    }
    if not model.config.tie_word_embeddings:
        tree["lm_head"] = {"kernel": s["lm_head.weight"].T}
    return tree


def assert_equal(tree, reference):
    assert jax.tree.structure(tree) == jax.tree.structure(reference)
    jax.tree.map(np.testing.assert_array_equal, tree, reference)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shard", ["50GB", "5KB"])
def test_every_tensor_of_transformers_arrives(tmp_path, kv_heads, tied, shard):
    model = torch_llama.make(kv_heads=kv_heads, tied=tied)
    torch_llama.saved(model, tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "50GB")
    base = read_base(tmp_path)
    assert base.config == ModelConfig(
        vocab=40, embed=24, mlp=20, layers=3, heads=4, kv_heads=kv_heads, head_dim=8, norm_eps=1e-6, tied_head=tied,
        max_length=64, stored_dtype="float32",
    )  # fmt: skip
    assert_equal(load_params(base, abstract(base)), expected(model))


def test_the_tree_is_the_contract(tmp_path):
    base = read_base(torch_llama.saved(torch_llama.make(), tmp_path))
    assert jax.tree.map(lambda leaf: leaf.shape, base.params) == {
        "embed_tokens": {"embedding": (40, 24)},
        "layers": {
            "input_layernorm": {"scale": (3, 24)},
            "mlp": {
                "down_proj": {"kernel": (3, 20, 24)},
                "gate_proj": {"kernel": (3, 24, 20)},
                "up_proj": {"kernel": (3, 24, 20)},
            },
            "post_attention_layernorm": {"scale": (3, 24)},
            "self_attn": {
                "k_proj": {"kernel": (3, 24, 16)},
                "o_proj": {"kernel": (3, 32, 24)},
                "q_proj": {"kernel": (3, 24, 32)},
                "v_proj": {"kernel": (3, 24, 16)},
            },
        },
        "lm_head": {"kernel": (24, 40)},
        "norm": {"scale": (24,)},
    }


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_dtypes_convert_on_the_way(tmp_path, held, wanted):
    model = torch_llama.make(dtype=held)
    base = read_base(torch_llama.saved(model, tmp_path))
    assert base.config.stored_dtype == str(held).removeprefix("torch.")
    params = load_params(base, abstract(base, jnp.dtype(wanted)))
    reference = jax.tree.map(lambda x: x.astype(jnp.dtype(wanted)), expected(model))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {wanted}
    assert_equal(params, reference)


def test_sharded_leaves_are_the_same_and_lie_where_they_were_asked_for(tmp_path):
    model = torch_llama.make()
    base = read_base(torch_llama.saved(model, tmp_path, max_shard_size="5KB"))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = {1: P("fsdp"), 2: P(None, "fsdp"), 3: P(None, "fsdp", "tensor")}
    wanted = abstract(base, sharding=lambda leaf: NamedSharding(mesh, specs[len(leaf.shape)]))
    params = load_params(base, wanted)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].addressable_shards[0].data.shape == (3, 12, 16)
    assert_equal(params, expected(model))


def test_each_shard_reads_only_its_part(tmp_path, monkeypatch):
    base = read_base(torch_llama.saved(torch_llama.make(), tmp_path))
    leaf = base.params["layers"]["mlp"]["up_proj"]["kernel"]  # [3, 24, 20], stored [20, 24] a layer
    asked = []
    spied = tuple(
        type(t)(t.shape, t.dtype, lambda index, i=i, t=t: asked.append((i, index)) or t.read(index))
        for i, t in enumerate(leaf.tensors)
    )
    part = type(leaf)(spied, leaf.stacked, leaf.transposed).read((slice(1, 3), slice(6, 12), slice(None)), np.float32)
    assert asked == [(1, (slice(0, 20), slice(6, 12))), (2, (slice(0, 20), slice(6, 12)))]
    np.testing.assert_array_equal(part, np.asarray(leaf)[1:3, 6:12])


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces and bands of a few rows, so that a tiny model is loaded as a large one onto an accelerator.

    -> (bytes of a piece, whether the array stayed where it was), for each piece that was placed.
    """
    placed, place = [], load_lib._place

    def spied(array, piece, starts, sharding):
        before = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
        array = place(array, piece, starts, sharding)
        placed.append((piece.nbytes, before == [x.data.unsafe_buffer_pointer() for x in array.addressable_shards]))
        return array

    monkeypatch.setattr(load_lib, "_place", spied)
    monkeypatch.setattr(load_lib, "_in_host_memory", lambda sharding: False)
    monkeypatch.setattr(load_lib, "PIECE_BYTES", 1024)
    monkeypatch.setattr(base_lib, "BAND_BYTES", 256)
    return placed


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_a_large_leaf_is_filled_in_place_piece_by_piece(tmp_path, small_pieces, held, wanted):
    model = torch_llama.make(dtype=held)
    base = read_base(torch_llama.saved(model, tmp_path))
    params = load_params(base, abstract(base, jnp.dtype(wanted)))
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.dtype(wanted)), expected(model)))
    assert len(small_pieces) > 20
    assert max(nbytes for nbytes, _ in small_pieces) <= 1024
    assert all(in_place for _, in_place in small_pieces)


def test_on_a_cpu_a_large_leaf_is_read_into_its_place(tmp_path, small_pieces, monkeypatch):
    """The array is the very memory that was read into: there is no second copy, not even for a moment."""
    monkeypatch.setattr(load_lib, "_in_host_memory", lambda sharding: True)
    made, aligned = [], load_lib._aligned
    monkeypatch.setattr(load_lib, "_aligned", lambda *arguments: made.append(aligned(*arguments)) or made[-1])
    model = torch_llama.make()
    base = read_base(torch_llama.saved(model, tmp_path))
    params = load_params(base, abstract(base, jnp.bfloat16))
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected(model)))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)] == [memory.ctypes.data for memory in made]
    assert small_pieces == []


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.slow), 1, 2])  # no mesh axis divides layers
def test_large_leaves_are_sharded_along_any_axis_and_read_once(tmp_path, small_pieces, axis):
    """Eight layers, for the stacked leaves are cut along them too. Two devices hold each shard, the file is read once."""
    model = torch_llama.make(layers=8)
    base = read_base(torch_llama.saved(model, tmp_path))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    read = []
    spied = lambda t: Tensor(t.shape, t.dtype, lambda index: (part := t.read(index), read.append(part.size))[0])  # noqa: E731
    tree = jax.tree.map(
        lambda leaf: type(leaf)(tuple(map(spied, leaf.tensors)), leaf.stacked, leaf.transposed), base.params
    )
    # A leaf of fewer axes is cut along its last one; 4 divides every size here.
    cut = lambda leaf: P(*[None] * min(axis, len(leaf.shape) - 1), "fsdp")  # noqa: E731
    wanted = abstract(base, jnp.bfloat16, lambda leaf: NamedSharding(mesh, cut(leaf)))
    params = load_params(dataclasses.replace(base, params=tree), wanted)
    assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected(model)))
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(small_pieces) > 20 and all(in_place for _, in_place in small_pieces)


def test_a_leaf_without_a_sharding_is_committed_to_no_device(tmp_path, small_pieces):
    base = read_base(torch_llama.saved(torch_llama.make(), tmp_path))
    assert not any(leaf.committed for leaf in jax.tree.leaves(load_params(base, abstract(base))))


def test_every_bit_arrives_also_of_what_is_no_number(tmp_path):
    model = torch_llama.make(dtype=torch.bfloat16)
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[:4, :4] = torch.tensor([float("nan"), -0.0, 1e-40, float("inf")])
    base = read_base(torch_llama.saved(model, tmp_path))
    found = np.asarray(load_params(base, abstract(base, jnp.bfloat16))["layers"]["mlp"]["up_proj"]["kernel"][1])
    np.testing.assert_array_equal(found.view(np.uint16), weight.detach().view(torch.uint16).numpy().T)


def test_a_stored_leaf_stands_in_for_an_array(tmp_path):
    model = torch_llama.make(dtype=torch.bfloat16)
    stored = read_base(torch_llama.saved(model, tmp_path)).params
    leaf, reference = stored["layers"]["self_attn"]["o_proj"]["kernel"], expected(model)
    assert (leaf.shape, leaf.dtype.name, leaf[2].dtype.name) == ((3, 32, 24), "bfloat16", "bfloat16")
    np.testing.assert_array_equal(leaf[2], reference["layers"]["self_attn"]["o_proj"]["kernel"][2])
    np.testing.assert_array_equal(np.asarray(stored["norm"]["scale"]), reference["norm"]["scale"])


def test_another_shape_is_refused(tmp_path):
    base = read_base(torch_llama.saved(torch_llama.make(), tmp_path))
    wanted = abstract(base)
    wanted["norm"]["scale"] = jax.ShapeDtypeStruct((25,), jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(25,\) is wanted, the config makes it \(24,\)"):
        load_params(base, wanted)


def test_stories260k_whole_and_sharded_are_one_base(shared_data):
    whole, sharded = (read_base(shared_data / "stories260k" / name) for name in ("hf", "hf_sharded"))
    # A literal, because a workdir refuses to resume when this changes: a new way of hashing breaks every old run.
    assert whole.fingerprint == sharded.fingerprint == "bca83376f29f5c2c7a73b7986301a6db"
    assert whole.config == sharded.config
    assert_equal(load_params(whole, abstract(whole)), load_params(sharded, abstract(sharded)))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm", "lm_head"]
)
def test_a_change_in_any_tensor_changes_the_fingerprint(tmp_path, name):
    model = torch_llama.make()
    before = read_base(torch_llama.saved(model, tmp_path / "before")).fingerprint
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").view(-1)[-1] += 1e-3  # tensors this small are hashed whole
    assert read_base(torch_llama.saved(model, tmp_path / "after")).fingerprint != before


def test_the_fingerprint_of_a_large_tensor_samples_it_from_end_to_end():
    samples = samples_of(Tensor((4001, 8048), np.dtype(np.float32), None))
    assert len(samples) == 16
    assert samples[0] == (slice(0, 1), slice(0, 2048))
    assert samples[-1] == (slice(4000, 4001), slice(6000, 8048))


def test_a_base_in_another_dtype_is_another_base(tmp_path):
    model = torch_llama.make()
    whole = read_base(torch_llama.saved(model, tmp_path / "float32"))
    half = read_base(torch_llama.saved(model.to(torch.bfloat16), tmp_path / "bfloat16"))
    assert whole.fingerprint != half.fingerprint


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder of a base model"):
        read_base(tmp_path / "nowhere")
