"""Meta's folders: shards joined, rows of q and k in Hugging Face's order, and what params.json leaves open."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch_llama
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torch_llama import torch

import lowrank
from lowrank.errors import UserError
from lowrank.families.config import RopeScaling
from lowrank.weights import meta
from lowrank.weights.base import read_base
from lowrank.weights.check import same
from lowrank.weights.load import load_params
from lowrank.weights.tensor_file import Tensor

NAMES = {  # Hugging Face's, within a layer -> Meta's, and the axis that its shards are cut along
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def meta_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in Meta's order: pair (i, i + head_dim/2) of Hugging Face's becomes (2i, 2i + 1)."""
    rows = []
    head_dim = len(weight) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [weight[head * head_dim + i], weight[head * head_dim + i + head_dim // 2]]
    return torch.stack(rows)


def as_meta(model, kv_heads: int, embedding_axis: int) -> dict:
    """Meta's name -> (tensor, axis of its cut)."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            tensors["tok_embeddings.weight"] = (tensor, embedding_axis)
        elif name in ("model.norm.weight", "lm_head.weight"):
            tensors["norm.weight" if "norm" in name else "output.weight"] = (tensor, None if "norm" in name else 0)
        else:
            _, _, layer, rest = name.split(".", 3)
            ours, axis = NAMES[rest.removesuffix(".weight")]
            heads = {"attention.wq": 4, "attention.wk": kv_heads}.get(ours)
            tensors[f"layers.{layer}.{ours}.weight"] = (meta_rows(tensor, heads) if heads else tensor, axis)
    return tensors


def write(folder, model, kv_heads=2, shards=1, embedding_axis=1, change=lambda shards: None, **params):
    folder.mkdir()
    whole = as_meta(model, kv_heads, embedding_axis)
    cut = [
        {
            name: tensor if axis is None else tensor.chunk(shards, axis)[i].clone()
            for name, (tensor, axis) in whole.items()
        }
        for i in range(shards)
    ]
    for shard in cut:
        shard["rope.freqs"] = torch.ones(4)
    change(cut)
    for i, shard in enumerate(cut):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    fields = {"dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": kv_heads, "norm_eps": 1e-6, "vocab_size": -1}
    fields |= {"head_dim": 8, "multiple_of": 4, "rope_theta": 10000.0} | params
    (folder / "params.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def model():
    return torch_llama.make()


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return read_base(torch_llama.saved(model, tmp_path_factory.mktemp("hf")))


def assert_same_params(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found.params, expected.params
    )


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 1), (2, 1), (2, 0), (4, 0), (4, 1)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_folder_of_shards_is_the_hugging_face_folder(tmp_path, shards, embedding_axis, kv_heads):
    model = torch_llama.make(kv_heads=kv_heads)
    expected = read_base(torch_llama.saved(model, tmp_path / "hf"))
    found = read_base(write(tmp_path / "meta", model, kv_heads, shards, embedding_axis))
    assert_same_params(found, expected)
    assert found.fingerprint == expected.fingerprint
    for name in ("embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "vocab", "norm_eps", "tied_head"):
        assert getattr(found.config, name) == getattr(expected.config, name), name


def test_any_part_of_a_joined_and_turned_tensor_is_that_part(model, tmp_path):
    _, tensors = meta.open_folder(write(tmp_path / "meta", model, shards=2))
    state = torch_llama.state(model)
    draw = np.random.default_rng(0)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
        name = f"model.layers.1.{name}.weight"
        for _ in range(30):
            index = tuple(slice(*sorted(draw.choice(size + 1, 2, replace=False))) for size in tensors[name].shape)
            np.testing.assert_array_equal(tensors[name].read(index), state[name][index])


def test_the_four_formats_of_the_real_weights_are_one_model(shared_data):
    folder = shared_data / "stories260k"
    expected = json.loads((folder / "expected.json").read_text())
    bases = {name: read_base(folder / name) for name in ("hf", "hf_sharded", "hf_bin", "meta")}
    assert {base.fingerprint for base in bases.values()} == {"bca83376f29f5c2c7a73b7986301a6db"}
    for base in bases.values():
        assert_same_params(base, bases["hf"])
    (text,) = lowrank.load(folder / "meta").generate([""], max_new_tokens=len(expected["greedy_ids"]) - 1)
    assert text == expected["greedy_text"]


def test_a_head_that_repeats_the_embedding_or_is_absent_is_tied(tmp_path):
    model = torch_llama.make(tied=True)
    expected = read_base(torch_llama.saved(model, tmp_path / "hf"))
    for name, change in {
        "twice": lambda _: None,
        "once": lambda shards: [x.pop("output.weight") for x in shards],
    }.items():
        found = read_base(write(tmp_path / name, model, shards=2, change=change))
        assert found.config.tied_head and found.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {"max_length": 2048, "rope_scaling": None, "eos_ids": (2,), "family": "llama"}),
        ({"norm_eps": 1e-5}, {"max_length": 4096}),
        ({"rope_theta": 500000.0}, {"max_length": 8192, "rope_theta": 500000.0}),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            {"max_length": 131072, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)},
        ),
        (
            {"hidden_dim": 20, "sliding_window": 9, "norm_eps": 1e-5},
            {"family": "mistral", "windows": (9, 9, 9), "max_length": 32768},
        ),
        ({"n_kv_heads": None, "moe": None, "max_seq_len": 100}, {"kv_heads": 4}),
    ],
)
def test_what_params_json_leaves_open_follows_from_the_generation(tmp_path, params, expected):
    model = torch_llama.make(kv_heads=expected.get("kv_heads", 2))
    config = read_base(write(tmp_path / "meta", model, expected.get("kv_heads", 2), **params)).config
    for name, value in expected.items():
        assert getattr(config, name) == value, name


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        read_base(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))
    return str(error.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"moe": {"num_experts": 8}, "lora_args": {"rank": 8}},
            ('moe = {"num_experts": 8} is not supp', "lora_args = "),
        ),
        ({"dim": None, "norm_eps": None}, ("dim is missing", "norm_eps is missing")),
        ({"n_heads": "4", "rope_theta": -1}, ('n_heads = "4" is not a positive integer', "rope_theta = -1 is not a")),
        ({"n_kv_heads": 3}, ("n_heads 4 is no multiple of n_kv_heads 3",)),
        ({"head_dim": None, "dim": 25}, ("dim 25 is no multiple of n_heads 4",)),
        ({"use_scaled_rope": 8}, ("use_scaled_rope = 8 is not true or false",)),
        ({"n_layers": 4}, ("missing: model.layers.3.",)),
        ({"dim": 32}, ("misshapen: ",)),
        ({"head_dim": 4}, ("misshapen: model.layers.{0,1,2}.self_attn.q_proj.weight",)),
    ],
)
def test_fields_that_do_not_fit_are_named(model, tmp_path, params, said):
    message = refusal(write(tmp_path / "meta", model, **params))
    assert all(part in message for part in said), message


def test_shards_that_do_not_fit_are_named(model, tmp_path):
    def spoil(shards):
        shards[1].pop("layers.0.attention.wq.weight")
        shards[0]["layers.1.feed_forward.w2.weight"] = torch.ones(24, 3)
        shards[1]["norm.weight"] = torch.zeros(24)
        for shard in shards:
            shard["layers.0.attention.wz.weight"] = torch.ones(2)

    message = refusal(write(tmp_path / "meta", model, shards=2, change=spoil))
    for said in (
        "layers.0.attention.wq.weight is missing in shard 01",
        "layers.1.feed_forward.w2.weight is [24, 3] and [24, 10] in different shards",
        "norm.weight is not the same in all shards",
        "layers.0.attention.wz.weight is no tensor of a Llama",
    ):
        assert said in message


def test_missing_and_broken_shards_are_named(model, tmp_path):
    folder = write(tmp_path / "gap", model, shards=4)
    (folder / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth missing among 3 shards" in refusal(folder)
    folder = write(tmp_path / "broken", model, shards=2)
    for file in folder.glob("*.pth"):
        file.write_bytes(file.read_bytes()[:-900])
    message = refusal(folder)
    assert "consolidated.00.pth" in message and "consolidated.01.pth" in message
    folder = write(tmp_path / "none", model)
    (folder / "consolidated.00.pth").unlink()
    assert "has params.json but no consolidated.00.pth" in refusal(folder)
    (folder / "params.json").write_text("[1")
    assert "params.json: cannot be read as a JSON object" in refusal(folder)


def test_a_vocabulary_other_than_the_tensors_is_refused(model, tmp_path):
    assert "misshapen: " in refusal(write(tmp_path / "less", model, vocab_size=39))
    assert "vocab_size = true is not a positive integer" in refusal(write(tmp_path / "odd", model, vocab_size=True))


def test_a_shard_under_the_number_of_another_is_refused(model, tmp_path):
    folder = write(tmp_path / "meta", model, shards=2)
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    assert "two shards hold the same weights instead of each its own" in refusal(folder)


def test_config_json_is_followed_where_it_has_weights_and_params_json_else(model, tmp_path):
    folder, other = write(tmp_path / "both", model), torch_llama.make(seed=1)
    ours = read_base(folder).fingerprint
    other.config.save_pretrained(folder)
    assert read_base(folder).fingerprint == ours
    torch_llama.saved(other, folder)
    assert read_base(folder).fingerprint != ours


def test_code_llama_reads_16384_tokens(model, tmp_path):
    config = read_base(write(tmp_path / "meta", model, norm_eps=1e-5, rope_theta=1e6)).config
    assert config.max_length == 16_384


def test_an_untied_model_is_opened_without_reading_its_matrices():
    """Whether the head is the embedding shows in their first rows."""
    asked = []
    contents = np.random.default_rng(0).normal(size=(2, 5000, 8)).astype(np.float32)
    one, other = (Tensor(x.shape, x.dtype, lambda index, x=x: asked.append(index) or x[index].copy()) for x in contents)
    assert not same(one, other)
    assert asked == [(slice(0, 1), slice(0, 8))] * 2
    again = Tensor(one.shape, one.dtype, one.read)
    assert same(one, again) and asked[-1] == (slice(4097, 5000), slice(0, 8))


def test_a_flipped_bit_is_found_by_devices_that_read_a_little_each(tmp_path, shared_data):
    folder = tmp_path / "hf_bin"
    shutil.copytree(shared_data / "stories260k" / "hf_bin", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    content = bytearray((folder / "pytorch_model.bin").read_bytes())
    content[70_000] ^= 1  # in the middle of the embedding
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="data/0 does not have its checksum"):
        base = read_base(folder)
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P(None, "fsdp"))
        embedding = {"embedding": jax.ShapeDtypeStruct((512, 64), np.float32, sharding=sharding)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), base.params)
        load_params(base, shapes | {"embed_tokens": embedding})
