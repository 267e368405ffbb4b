"""The same ten steps on one device and on every mesh of eight: losses, adapters, and where each leaf lies.

The compiled step is read, too: a frozen base has no gradient, so nothing may sum one over devices.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.data.batch import Batch
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.kernels import INTERPRETED
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.planning.collectives import collectives
from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from lowrank.training.step import abstract_state, init_state, make_train_step

STEPS = 10
# Every axis differs from every other in size, and so do their halves and eighths: none can be taken for another.
MODEL = ModelConfig(vocab=96, embed=64, mlp=160, layers=2, heads=16, kv_heads=8, head_dim=8)
RANK = 4
PERMUTED = (3, 0, 7, 4, 1, 6, 5, 2)  # the devices in the meshes of this file: their order changes nothing
FAST = ((2, 2, 2),)
MESHES = [
    sizes if sizes in FAST else pytest.param(sizes, marks=pytest.mark.slow)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if math.prod(sizes) == 8
]

# Where each leaf lies: the mesh axis (or none) of each of its axes. Adapters follow their projections; ranks are never cut.
LAYOUT = {
    "params/embed_tokens/embedding": ("tensor", "fsdp"),
    "params/layers/input_layernorm/scale": (None, "fsdp"),
    "params/layers/post_attention_layernorm/scale": (None, "fsdp"),
    "params/norm/scale": ("fsdp",),
    "params/lm_head/kernel": ("fsdp", "tensor"),
}
for _name in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"):
    LAYOUT[f"params/layers/{_name}/kernel"] = (None, "fsdp", "tensor")
    LAYOUT[f"lora/layers/{_name}/lora_a"] = (None, "fsdp", None)
    LAYOUT[f"lora/layers/{_name}/lora_b"] = (None, None, "tensor")
for _name in ("self_attn/o_proj", "mlp/down_proj"):
    LAYOUT[f"params/layers/{_name}/kernel"] = (None, "tensor", "fsdp")
    LAYOUT[f"lora/layers/{_name}/lora_a"] = (None, "tensor", None)
    LAYOUT[f"lora/layers/{_name}/lora_b"] = (None, None, "fsdp")


def batches():
    """Packed rows with padding and prompts, so that devices have unequal numbers of trained tokens."""
    random = np.random.default_rng(0)
    slots = np.arange(12)[None]
    for _ in range(STEPS):
        tokens = random.integers(0, MODEL.vocab, (8, 13), np.int32)
        lengths = random.integers(3, 9, (8, 1))
        segments = np.where(slots < lengths, 1, np.where(slots < 11, 2, 0)).astype(np.int32)
        positions = np.where(slots < lengths, slots, slots - lengths).astype(np.int32)
        yield Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            positions=np.where(segments > 0, positions, 0),
            segment_ids=segments,
            loss_mask=(segments > 0) & (random.random((8, 12)) < 0.6),
        )


@functools.cache
def run_of(*arguments) -> "Run":
    return Run(*arguments)


class Run:
    """The model of this file on a mesh: its step, and what it starts from."""

    def __init__(self, sizes: tuple[int, int, int], mode: str = "lora", order=None):
        devices = [jax.devices()[place] for place in order or PERMUTED]
        self.mesh = mesh_lib.make_mesh(MeshConfig(*sizes), devices=devices[: math.prod(sizes)])
        with_adapter = Decoder(MODEL, LoraConfig(rank=RANK, alpha=8.0))
        model = with_adapter if mode == "lora" else Decoder(MODEL)
        shapes, axes = decoder.abstract(model)
        shapes = mesh_lib.with_shardings(self.mesh, axes, shapes)
        fresh = running.init(with_adapter)  # compiled once for all of this file
        variables = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding), {name: fresh[name] for name in shapes}, shapes
        )
        mask = partition.trainable_mask(variables, mode)
        self.trainable, self.frozen = partition.split(variables, mask)
        optim = OptimConfig(learning_rate=1e-2)
        schedule = learning_rate_schedule(optim, STEPS)
        self.optimizer = make_optimizer(optim, schedule, mask)
        self.layout = abstract_state(self.optimizer, self.trainable, self.mesh)
        self.step = make_train_step(model, self.optimizer, schedule, 1, self.layout)

    def start(self):
        return init_state(self.optimizer, jax.tree.map(jnp.copy, self.trainable), jax.random.key(0), self.layout)

    def put(self, batch):
        layout = NamedSharding(self.mesh, mesh_lib.spec(("batch", "length")))
        return jax.device_put(batch, layout)

    @functools.cached_property
    def compiled(self):
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.start(), self.frozen, self.put(next(batches()))).compile()

    def steps(self):
        """-> losses and the state after ten steps."""
        state, losses = self.start(), []
        for batch in batches():
            state, metrics = self.compiled(state, self.frozen, self.put(batch))
            losses.append(float(metrics.loss))
        return losses, state

    def collectives(self):
        """Of the compiled step."""
        return collectives(self.compiled.as_text())


@pytest.fixture(scope="module")
def alone():
    losses, state = Run((1, 1, 1)).steps()
    return losses, partition.named_leaves(jax.device_get(state.trainable))


def shard_shape(shape, layout, mesh) -> tuple[int, ...]:
    return tuple(size // (mesh.shape[axis] if axis else 1) for size, axis in zip(shape, layout, strict=True))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_computes_what_one_device_does(sizes, alone):
    run = run_of(sizes)
    losses, state = run.steps()
    expected_losses, expected = alone
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    adapter = partition.named_leaves(state.trainable)
    for name, leaf in expected.items():
        np.testing.assert_allclose(jax.device_get(adapter[name]), leaf, atol=1e-5, rtol=0, err_msg=name)
    # After ten steps every leaf still lies where the table says, moments beside their weights.
    seen = []
    for name, leaf in {
        **partition.named_leaves(run.frozen),
        **adapter,
        **partition.named_leaves(state.opt_state),
    }.items():
        own = next((own for own in LAYOUT if name.endswith(own)), None)
        if own is None:
            assert leaf.shape == (), name  # a counter
            continue
        seen.append(own)
        assert leaf.addressable_shards[0].data.shape == shard_shape(leaf.shape, LAYOUT[own], run.mesh), name
        assert leaf.sharding.is_equivalent_to(NamedSharding(run.mesh, PartitionSpec(*LAYOUT[own])), leaf.ndim), name
    assert sorted(seen) == sorted([*LAYOUT, *2 * [name for name in LAYOUT if name.startswith("lora/")]])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_given_order_of_devices_computes_what_a_permuted_one_does(sizes):
    (losses, state), (expected_losses, expected) = (Run(sizes, order=order).steps() for order in (range(8), PERMUTED))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)  # sums over devices, in another order
    found, expected = (partition.named_leaves(jax.device_get(each.trainable)) for each in (state, expected))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-5, rtol=0, err_msg=name)


def reductions(run: Run):
    """What the compiled step sums over devices that hold other rows: not what devices along `tensor` have of the same rows."""
    place = {index: where[:2] for index, where in enumerate(np.ndindex(run.mesh.devices.shape))}  # data, fsdp
    return [
        one
        for one in run.collectives()
        if one.kind in ("all-reduce", "reduce-scatter") and len({place[device] for device in one.group}) > 1
    ]


def of_base(found, mesh) -> list[tuple[int, ...]]:
    """Those of the summed arrays that are the gradient of a matrix of the base, whole or cut, one layer or all."""
    shapes = {name: leaf.shape for name, leaf in partition.named_leaves(decoder.abstract(Decoder(MODEL))[0]).items()}
    matrices = set()
    for name, shape in shapes.items():
        if not name.endswith("scale"):
            for one in (shape, shard_shape(shape, LAYOUT[name], mesh)):
                matrices |= {tuple(sorted(one)), tuple(sorted(one[-2:]))}
    return [shape for one in found for _, shape in one.shapes if tuple(sorted(shape)) in matrices]


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_no_gradient_of_the_base_is_summed_and_no_more_than_the_adapter(sizes):
    run = run_of(sizes)
    found = reductions(run)
    assert of_base(found, run.mesh) == []
    adapter, words = partition.nbytes(run.trainable), 256  # the loss, token counts, the norm's parts
    _, fsdp, tensor = sizes
    # A leaf that is cut over fsdp may be summed there first, whole, and then each part of it over data.
    along_fsdp = [one for one in found if run.mesh.devices.flat[one.group[1]] in run.mesh.devices[0]]
    summed = sum(one.result_bytes * one.times for one in along_fsdp)
    summed_over_data = sum(one.result_bytes * one.times for one in found if one not in along_fsdp)
    assert summed <= adapter + words
    assert summed_over_data * fsdp <= adapter + words
    assert summed + summed_over_data * fsdp >= adapter / tensor  # but its own gradient has to be


@pytest.mark.slow
def test_the_same_look_at_full_fine_tuning_finds_gradients_of_the_base():
    run = Run((8, 1, 1), mode="full")
    found = of_base(reductions(run), run.mesh)
    assert {tuple(sorted(shape[-2:])) for shape in found} >= {(64, 64), (64, 96), (64, 128), (64, 160)}


def test_key_value_heads_fewer_than_tensor_are_refused():
    mesh = mesh_lib.make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(UserError, match=r"mesh.tensor=8 does not divide the model's kv_heads=4; choose a smaller one"):
        mesh_lib.check_heads(mesh, heads=16, kv_heads=4)


@pytest.mark.slow  # tests/model/test_kernels.py has the kernel, tests/planning/test_plan.py its program for a mesh of TPUs
def test_splash_over_a_mesh_computes_what_one_device_does():
    """Each device has its own rows and heads."""
    model = dataclasses.replace(MODEL, windows=(5, 5))
    rows = np.repeat([[1, 2, 3, 0]], 4, axis=0).repeat([40, 50, 30, 8], axis=1).astype(np.int32)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab, rows.shape, np.int32)
    positions = np.concatenate([np.arange(count) for count in (40, 50, 30, 8)])[None].repeat(4, axis=0)

    def loss_and_gradient(attention: str, sizes):
        mesh = mesh_lib.make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
        decoder_ = Decoder(model, LoraConfig(rank=RANK), remat="dots", attention=attention)
        variables = running.init(decoder_)

        def loss(lora, params):
            hidden, head, _ = decoder_.apply({"params": params, "lora": lora}, tokens, positions, rows)
            return jnp.mean(jnp.square(hidden @ head))

        lora = jax.tree.map(lambda leaf: leaf + 0.01, variables["lora"])  # lora_b is zero at first
        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(lora, variables["params"]))

    expected = loss_and_gradient("xla", (1, 1, 1))
    found = loss_and_gradient(INTERPRETED, (2, 1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected)
