"""The mesh and the table from logical axes to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.training import partition

MODEL = Decoder(ModelConfig(vocab=64, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8), LoraConfig(rank=2))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=4), (2, 4, 1)),
    ],
)
def test_minus_one_takes_the_rest(config, shape):
    mesh = mesh_lib.make_mesh(config)
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_a_mesh_that_leaves_devices_out_is_refused(config):
    with pytest.raises(UserError, match="8 devices"):
        mesh_lib.make_mesh(config)


def test_every_leaf_has_the_layout_of_the_table():
    shapes, axes = decoder.abstract(MODEL)
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    leaves = partition.named_leaves(mesh_lib.with_shardings(mesh, axes, shapes))
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in leaves.items()}
    attention, mlp = "layers/self_attn", "layers/mlp"
    expected = {
        "params/embed_tokens/embedding": ("tensor", "fsdp"),
        "params/layers/input_layernorm/scale": (None, "fsdp"),
        "params/layers/post_attention_layernorm/scale": (None, "fsdp"),
        "params/norm/scale": ("fsdp",),
        "params/lm_head/kernel": ("fsdp", "tensor"),
    }
    for name in (*(f"{attention}/{t}_proj" for t in "qkv"), f"{mlp}/gate_proj", f"{mlp}/up_proj"):
        expected[f"params/{name}/kernel"] = (None, "fsdp", "tensor")
        expected[f"lora/{name}/lora_a"] = (None, "fsdp", None)
        expected[f"lora/{name}/lora_b"] = (None, None, "tensor")
    for name in (f"{attention}/o_proj", f"{mlp}/down_proj"):
        expected[f"params/{name}/kernel"] = (None, "tensor", "fsdp")
        expected[f"lora/{name}/lora_a"] = (None, "tensor", None)
        expected[f"lora/{name}/lora_b"] = (None, None, "fsdp")
    assert specs == expected


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="match no rule"):
        mesh_lib.spec(("layers", "embd"))


def test_a_mesh_axis_claimed_twice_is_an_error():
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        mesh_lib.spec(("heads", "mlp"))


def test_what_does_not_divide_is_listed_at_once():
    model = Decoder(ModelConfig(vocab=64, embed=30, mlp=44, layers=2, heads=4, kv_heads=2, head_dim=8))
    shapes, axes = decoder.abstract(model)
    with pytest.raises(UserError) as error:
        mesh_lib.with_shardings(mesh_lib.make_mesh(MeshConfig(data=1, tensor=8)), axes, shapes)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"params/layers/mlp/{name}/kernel has 44 along mlp, not divisible by tensor=8" in str(error.value)


def test_a_head_is_never_cut():
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, tensor=4))
    mesh_lib.check_heads(mesh, heads=8, kv_heads=4)
    with pytest.raises(UserError, match="kv_heads=2"):  # though 2 heads of 8 could be cut into 4 parts of 4
        mesh_lib.check_heads(mesh, heads=8, kv_heads=2)


def test_constrain_does_nothing_without_a_mesh():
    x = jax.numpy.ones((3, 5))
    assert mesh_lib.constrain(x, "batch", "length") is x


def test_spec_of_the_batch():
    assert mesh_lib.spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)
