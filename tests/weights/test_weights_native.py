"""The native base: what was written is what is read, whole or by any slice, and what was tampered with is one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_llama
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from torch_llama import torch

from lowrank.errors import UserError
from lowrank.weights import native
from lowrank.weights.base import read_base
from lowrank.weights.convert import convert as convert_base
from lowrank.weights.fingerprint import fingerprint
from lowrank.weights.load import load_params

FILE = "params-00001-of-00001.safetensors"


def convert(source, to, dtype=None):
    convert_base(source, to, dtype)
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return torch_llama.saved(torch_llama.make(), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return convert(source, tmp_path_factory.mktemp("native") / "base")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        load(read_base(folder))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(folder)).removeprefix(": ")


def load(base, dtype=jnp.float32, sharding=lambda leaf: None):
    return load_params(
        base, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding(x)), base.params)
    )


def change_manifest(folder, change):
    path = folder / native.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip_a_bit(path, name, element):
    """Of one element of a float32 tensor in a safetensors file."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[8 + length + start + 4 * element] ^= 1
    path.write_bytes(raw)


# ------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_native_base_is_the_base_it_was_made_of(tmp_path, dtype, tied):
    source = read_base(torch_llama.saved(torch_llama.make(dtype=dtype, tied=tied), tmp_path / "source"))
    made = read_base(convert(source.folder, tmp_path / "native"))
    assert (made.config, made.fingerprint) == (source.config, source.fingerprint)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), source.params
    )
    jax.tree.map(np.testing.assert_array_equal, load(made), load(source))


def test_the_files_hold_our_leaves_layer_by_layer(source, whole):
    tensors = load_file(whole / FILE)
    leaf = read_base(source).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(tensors) == 3 * 9 + 3
    for layer in range(3):
        np.testing.assert_array_equal(tensors[f"params.layers.{layer}.mlp.up_proj.kernel"], leaf[layer])
    entry = json.loads((whole / native.MANIFEST).read_text())["tensors"]["params.norm.scale"]
    assert (entry["file"], entry["dtype"], entry["shape"]) == (FILE, "F32", [24])


def test_files_end_where_they_are_full(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FILE_BYTES", 12_000)
    folder = convert(source, tmp_path / "native")
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"params-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sum(len(load_file(file)) for file in files) == 30
    assert max(sum(x.nbytes for x in load_file(file).values()) for file in files) <= 12_000
    jax.tree.map(np.testing.assert_array_equal, load(read_base(folder)), load(read_base(whole)))


def test_eight_devices_read_their_shards(source, whole):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = {1: P("fsdp"), 2: P(None, "fsdp"), 3: P(None, "fsdp", "tensor")}
    params = load(read_base(whole), sharding=lambda leaf: NamedSharding(mesh, specs[len(leaf.shape)]))
    jax.tree.map(np.testing.assert_array_equal, params, load(read_base(source)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_conversion_is_the_folder_that_holds_that_dtype(source, tmp_path, dtype):
    """Rounded once, to nearest even, as numpy does; over two steps it has the same fingerprint as in one."""
    model = torch_llama.make().to(getattr(torch, dtype))
    there = read_base(torch_llama.saved(model, tmp_path / "there"))
    made = read_base(convert(source, tmp_path / "made", dtype))
    again = read_base(convert(convert(source, tmp_path / "float32"), tmp_path / "again", dtype))
    assert made.config == again.config == there.config and made.config.stored_dtype == dtype
    assert made.fingerprint == again.fingerprint == there.fingerprint
    for base in (made, again):
        jax.tree.map(np.testing.assert_array_equal, load(base), load(there))


def test_large_tensors_have_a_check_sum_for_every_part(tmp_path, monkeypatch):
    """Kernels of 24 rows of 128 bytes, with units of 512 bytes: six check sums of four rows."""
    monkeypatch.setattr(native, "UNIT_BYTES", 512)
    folder = convert(torch_llama.saved(torch_llama.make(), tmp_path / "source"), tmp_path / "native")
    name = "params.layers.1.self_attn.q_proj.kernel"
    entry = json.loads((folder / native.MANIFEST).read_text())["tensors"][name]
    assert (entry["shape"], len(entry["crc32"].split())) == ([24, 32], 6)
    change_manifest(folder, lambda manifest: manifest.update(samples=None))
    flip_a_bit(folder / FILE, name, 9 * 32)
    opened = {}
    for file in folder.glob("*.safetensors"):
        opened |= native.huggingface.open_file(file, [])
    change_manifest(folder, lambda manifest: manifest.update(samples=fingerprint(opened)))  # tensors this small are
    leaf = read_base(folder).params["layers"]["self_attn"]["q_proj"]["kernel"]  # sampled whole
    columns, bad = slice(0, 32), f"{name}: rows 8 to 11 are not what was written"
    for rows in (slice(0, 24), slice(8, 12), slice(4, 20)):
        with pytest.raises(UserError, match=bad):
            leaf.read((slice(1, 2), rows, columns), np.float32)
    # What is said not to be covered, and what is whole.
    for index in ((slice(1, 2), slice(9, 12), columns), (slice(1, 2), slice(0, 24), slice(0, 31))):
        leaf.read(index, np.float32)
    leaf.read((slice(1, 2), slice(12, 24), columns), np.float32)
    leaf.read((slice(0, 1), slice(0, 24), columns), np.float32)


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_a_flipped_bit_in_a_small_tensor_is_seen_at_opening(copy):
    flip_a_bit(copy / FILE, "params.layers.2.input_layernorm.scale", 5)
    assert refusal(copy) == "holds other weights than its lowrank.json says; copy it again, or convert again"


def test_a_flipped_bit_between_the_samples_is_seen_at_loading(tmp_path):
    """A kernel of 2 MB, of which opening looks at 16 times 8 KB only."""
    model = torch_llama.transformers.LlamaForCausalLM(
        torch_llama.transformers.LlamaConfig(
            vocab_size=40, hidden_size=256, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4
        )
    )
    folder = convert(torch_llama.saved(model, tmp_path / "source"), tmp_path / "native")
    flip_a_bit(folder / FILE, "params.layers.0.mlp.up_proj.kernel", 200 * 2048 + 7)
    read_base(folder)
    assert "params.layers.0.mlp.up_proj.kernel: rows 128 to 255 are not what was written; copy or convert" in refusal(
        folder
    )


@pytest.mark.parametrize("cut", [0, 7, 100, 20_000])
def test_a_truncated_file_is_named(copy, cut):
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:cut])
    assert refusal(copy).startswith(f"{FILE} cannot be read (")


def test_a_missing_file_is_named(copy):
    (copy / FILE).unlink()
    assert refusal(copy) == f"{FILE} is missing; copy the folder again, or convert again"


def test_files_that_are_mixed_up_are_all_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FILE_BYTES", 40_000)
    folder = convert(source, tmp_path / "native")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    said = refusal(folder)
    assert f"params.embed_tokens.embedding is in {second.name}, but not according to lowrank.json" in said
    assert f" is in {first.name}, but not according to lowrank.json" in said


def test_a_config_that_says_other_shapes_is_refused_with_all_that_differ(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 16, "num_hidden_layers": 2}))
    said = refusal(copy)
    assert "unknown to config.json: params.layers.2.input_layernorm.scale, " in said
    assert "of another shape than config.json says: params.layers.{0,1}.mlp.down_proj.kernel, " in said


def test_a_config_with_other_mathematics_is_refused(copy):
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"rope_theta": 20000.0}))
    assert "config.json is not the one that was written with these weights" in refusal(copy)


def test_tampered_tensors_are_refused_by_name(copy):
    def spoil(tensors):
        tensors["params.norm.scale"] = tensors["params.norm.scale"].astype(np.float16)
        tensors["params.layers.1.mlp.up_proj.kernel"] = tensors["params.layers.1.mlp.up_proj.kernel"].T.copy()
        del tensors["params.lm_head.kernel"]

    tensors = load_file(copy / FILE)
    spoil(tensors)
    save_file(tensors, copy / FILE)
    assert refusal(copy) == (
        "in lowrank.json but in no file: params.lm_head.kernel; of another dtype or shape than lowrank.json says: "
        "params.layers.1.mlp.up_proj.kernel, params.norm.scale; of another shape than config.json says: "
        "params.layers.1.mlp.up_proj.kernel; copy the folder again, or convert again"
    )


def test_a_newer_format_asks_for_a_newer_lowrank(copy):
    change_manifest(copy, lambda manifest: manifest.update(format=2))
    assert refusal(copy) == "/lowrank.json: has format 2, this lowrank reads 1; update lowrank"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "tensors": {"a": 1}}'])
def test_a_broken_manifest_is_one_line(copy, text):
    (copy / native.MANIFEST).write_text(text)
    assert refusal(copy).startswith("/lowrank.json: does not describe a native base (")


def test_a_manifest_names_no_file_outside_its_folder(copy):
    change_manifest(copy, lambda manifest: manifest["tensors"]["params.norm.scale"].update(file="../x.safetensors"))
    assert "'../x.safetensors' is no file of weights" in refusal(copy)
