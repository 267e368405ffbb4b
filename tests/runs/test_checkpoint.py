"""Checkpoints by themselves: what is in them, and that they do not care which devices wrote them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lowrank.errors import UserError
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.runs.checkpoint import Checkpoints
from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from lowrank.training.step import abstract_state, init_state


@pytest.fixture
def saved(tmp_path):
    """A state that eight devices hold in parts, saved as step 0 -> (folder, state, layout)."""
    mesh = mesh_lib.make_mesh(MeshConfig(data=1, fsdp=8))
    over_all = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    leaf = jax.device_put(np.arange(64, dtype=np.float32).reshape(2, 8, 4), over_all)
    variables = {"params": {"kernel": jnp.ones(3)}, "lora": {"q_proj": {"lora_a": leaf}}}
    mask = partition.trainable_mask(variables, "lora")
    optimizer = make_optimizer(OptimConfig(), learning_rate_schedule(OptimConfig(), 5), mask)
    trainable, _ = partition.split(variables, mask)
    layout = abstract_state(optimizer, trainable, mesh)
    state = init_state(optimizer, trainable, jax.random.key(0), layout)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(0, state, {"place": 3}, {"step": 0})
    return tmp_path, state, layout


def test_restored_as_it_was_and_laid_out_as_asked(saved):
    folder, state, layout = saved
    with Checkpoints(folder, keep=2) as checkpoints:
        restored, data = checkpoints.restore(0, layout)
    assert data == {"place": 3}
    assert (restored.step, restored.key) == (layout.step, layout.key)  # left to whoever asks
    for name, leaf in partition.named_leaves(state._replace(step=None, key=None)).items():
        found = partition.named_leaves(restored)[name]
        np.testing.assert_array_equal(found, leaf)
        assert found.sharding == leaf.sharding, name


def test_one_device_reads_what_eight_wrote(saved, caplog):
    folder, state, _ = saved
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.trainable)
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_adapter(0, shapes)
    leaf = restored["lora"]["q_proj"]["lora_a"]
    assert leaf.sharding == SingleDeviceSharding(jax.devices()[0])
    np.testing.assert_array_equal(leaf, state.trainable["lora"]["q_proj"]["lora_a"])
    assert not caplog.records  # a notebook would show them


def test_a_damaged_adapter_is_named_before_it_is_compared(saved):
    folder, _, layout = saved
    (folder / "checkpoints" / "0" / "adapter" / "_METADATA").write_bytes(b"\0" * 10)
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.raises(UserError, match="checkpoints/0 cannot be read"),
    ):
        checkpoints.restore_adapter(0, layout.trainable)


def test_a_damaged_checkpoint_is_named(saved):
    folder, _, layout = saved
    for file in (folder / "checkpoints" / "0" / "adapter").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(UserError, match="checkpoints/0 cannot be read"):
        checkpoints.restore(0, layout)
