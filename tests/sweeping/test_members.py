"""The members' step: padding is without effect, members do not disturb each other, and each does what a run alone does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from jax.sharding import PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import layer_scalars
from lowrank.config import Config, TrainConfig
from lowrank.data.batch import Batch
from lowrank.families.config import ModelConfig
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.sweeping import members
from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from lowrank.training.step import abstract_state, init_state, loss_sum, make_train_step

TINY = ModelConfig(vocab=32, embed=16, mlp=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_length=16, tied_head=True)
TARGETS = ("q_proj", "down_proj")
STEPS = 4
MEMBERS = [
    Config(
        lora=LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=TARGETS, scaling=scaling),
        train=TrainConfig(steps=STEPS, microbatches=2),
        optim=OptimConfig(**optim),
        seed=seed,
    )
    for rank, alpha, dropout, scaling, seed, optim in (
        (1, 4.0, 0.0, "standard", 0, {"learning_rate": 1e-2, "schedule": "cosine", "clip_norm": 0.0}),
        (3, 4.0, 0.2, "rslora", 1, {"learning_rate": 3e-2, "warmup_steps": 2, "weight_decay": 0.1}),
        (8, 16.0, 0.5, "standard", 2, {"learning_rate": 1e-3, "schedule": "linear", "clip_norm": 0.1}),
    )
]


def batch_of(seed, rows=4, length=8):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, TINY.vocab, (rows, length + 1), dtype=np.int32)
    return Batch(
        inputs=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, length), np.int32),
        loss_mask=draw.random((rows, length)) < 0.7,
    )


def model_of(lora, mesh):
    model = Decoder(TINY, lora, jnp.float32, jnp.float32)
    shapes, axes = decoder.abstract(model)
    return model, mesh_lib.with_shardings(mesh, axes, shapes)


@pytest.fixture(scope="module")
def params():
    return running.init(Decoder(TINY), 9)["params"]


def begin(config, model, mask):
    """A member's trainable tree and optimizer before step 1; lora_b is drawn too, so that dropout and scale matter at once."""
    draw = np.random.default_rng(config.seed)
    lora = decoder.abstract(model)[0]["lora"]
    lora = jax.tree.map(lambda leaf: np.float32(0.1 * draw.normal(size=leaf.shape)), lora)
    trainable, _ = partition.split({"params": None, "lora": lora}, {"params": None, "lora": mask["lora"]})
    schedule = learning_rate_schedule(config.optim, STEPS)
    return {**trainable, "params": jax.tree.map(lambda _: None, mask["params"])}, schedule


def run_alone(config, params, mesh):
    model, shapes = model_of(config.lora, mesh)
    mask = partition.trainable_mask(shapes, "lora")
    trainable, schedule = begin(config, model, mask)
    _, frozen = partition.split({"params": params, "lora": shapes["lora"]}, mask)
    optimizer = make_optimizer(config.optim, schedule, mask)
    layout = abstract_state(optimizer, partition.split(shapes, mask)[0], mesh)
    trainable = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), trainable, layout.trainable)
    state = init_state(optimizer, trainable, jax.random.key(config.seed), layout)
    step = make_train_step(model, optimizer, schedule, config.train.microbatches, layout)
    losses = []
    for i in range(STEPS):
        state, scalars = step(state, frozen, batch_of(i))
        losses.append(jax.device_get(scalars))
    return state, losses


def run_together(configs, params, mesh, at_once=1, poison=None, text_of=None):
    """-> (final state, metrics of each step, evaluation losses); `poison`: a member whose weights are not finite;
    `text_of`: a list that gets the compiled step's text."""
    wide = members.widest([config.lora for config in configs])
    model, shapes = model_of(wide, mesh)
    mask = partition.trainable_mask(shapes, "lora")
    trainable_shapes, _ = partition.split(shapes, mask)
    _, frozen = partition.split({"params": params, "lora": shapes["lora"]}, mask)
    optimizer = make_optimizer(configs[0].optim, learning_rate_schedule(configs[0].optim, STEPS), mask)
    layout = members.stacked_shapes(abstract_state(optimizer, trainable_shapes, mesh), len(configs), mesh)
    begun = []
    for i, config in enumerate(configs):
        own_model, own_shapes = model_of(config.lora, mesh)
        trainable, _ = begin(config, own_model, partition.trainable_mask(own_shapes, "lora"))
        trainable = members.padded(jax.device_get(trainable), trainable_shapes)
        begun.append(jax.tree.map(lambda leaf, i=i: leaf * (np.nan if i == poison else 1), trainable))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *begun)
    put = lambda tree, like: jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))  # noqa: E731
    trainable = put(stacked, layout.trainable)
    state = layout._replace(
        step=put(np.zeros(len(configs), np.int32), layout.step),
        trainable=trainable,
        opt_state=put(jax.vmap(optimizer.init)(trainable), layout.opt_state),
        key=put(jax.vmap(jax.random.key)(np.uint32([config.seed for config in configs])), layout.key),
    )
    frozen = jax.device_put(frozen, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    numbers = members.hyperparams_of(configs, STEPS, TINY.layers)
    seen = []
    with jax.set_mesh(mesh):
        step = running.make_members_step(model, configs[0], mask, layout, at_once)
        if text_of is not None:
            step = step.lower(state, numbers, frozen, batch_of(0), np.int32(0)).compile()
            text_of.append(step.as_text())
        for i in range(STEPS):
            state, scalars = step(state, numbers, frozen, batch_of(i), np.int32(i))
            seen.append(jax.device_get(scalars))
        evaluate = running.make_members_eval_step(model, at_once)
        losses, _ = evaluate(state.trainable, numbers, frozen, batch_of(99))
    return state, seen, jax.device_get(losses)


def one_device():
    return mesh_lib.members_mesh(mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def alone(params):
    return functools.cache(lambda i: run_alone(MEMBERS[i], params, one_device()))


@pytest.mark.parametrize(
    ("at_once", "compared"), [(1, (1,)), *(pytest.param(n, (0, 1, 2), marks=pytest.mark.slow) for n in (1, 3))]
)
def test_members_of_other_ranks_rates_and_seeds_equal_runs_alone(params, alone, at_once, compared):
    state, seen, _ = run_together(MEMBERS, params, one_device(), at_once)
    for i in compared:
        config, (own, metrics) = MEMBERS[i], alone(i)
        for together, single in zip(seen, metrics, strict=True):
            assert together.learning_rate[i] == single.learning_rate
            assert together.trained_tokens[i] == single.trained_tokens
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(
                    getattr(together, name)[i], getattr(single, name), rtol=2e-6
                )  # sums of another order
        for tree, expected in ((state.trainable, own.trainable), (state.opt_state, own.opt_state)):
            found = jax.tree.map(lambda leaf, i=i: leaf[i], jax.device_get(tree))
            cut = members.cut(found, expected)
            # Moments and weights where Adam divides a gradient by its own size: rounding, four updates long.
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-6), cut, jax.device_get(expected)
            )
            # Beyond the member's own rank all is zero, weights and moments alike: padding has no gradient.
            for leaf, inside in zip(jax.tree.leaves(found), jax.tree.leaves(cut), strict=True):
                assert np.abs(leaf).sum(dtype=np.float64) == np.abs(inside).sum(dtype=np.float64)
        assert config.lora.rank == own.trainable["lora"]["layers"]["self_attn"]["q_proj"]["lora_a"].shape[-1]


def test_a_member_that_is_not_finite_stays_as_it_was_and_disturbs_nobody(params):
    state, seen, losses = run_together(MEMBERS, params, one_device(), poison=1)
    fine, without, fine_losses = run_together(MEMBERS, params, one_device())
    assert state.step.tolist() == [STEPS, 0, STEPS]
    assert np.isnan(seen[0].loss[1]) and np.isnan(losses[1])
    for i in (0, 2):
        assert losses[i] == fine_losses[i]
        for one, other in zip(seen, without, strict=True):
            assert one.loss[i] == other.loss[i]
        for leaf, other in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(fine.trainable), strict=True):
            assert np.array_equal(leaf[i], other[i])
    assert all(np.abs(leaf[1]).max() == 0 for leaf in jax.tree.leaves(state.opt_state))  # not a single update


@pytest.mark.parametrize(
    ("count", "at_once", "mesh"),
    [(3, 1, (3, 1, 1)), *(pytest.param(4, *each, marks=pytest.mark.slow) for each in ((1, (2, 2, 2)), (2, (2, 1, 1))))],
)
def test_members_over_devices_equal_one_device_and_lie_where_they_should(params, count, at_once, mesh):
    configs = [dataclasses.replace(MEMBERS[i % 3], seed=i) for i in range(count)]
    expected, seen, losses = run_together(configs, params, one_device())
    data, fsdp, tensor = mesh
    devices = jax.devices()[: data * fsdp * tensor]
    over = mesh_lib.members_mesh(mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp, tensor), devices))
    assert over.shape == {"member": data, "data": 1, "fsdp": fsdp, "tensor": tensor}
    text = []
    state, found, over_losses = run_together(configs, params, over, at_once, text_of=text)
    if fsdp * tensor == 1:  # whole members on each device have nothing to tell each other
        assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text[0])
    for one, other in zip(found, seen, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=2e-6)
    np.testing.assert_allclose(over_losses, losses, rtol=2e-6)
    for leaf, other in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(expected.trainable), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=3e-6)  # as above
        assert leaf.sharding.spec[0] == "member"
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {count // data}


def test_widest_has_room_for_every_member_and_a_scale_of_one():
    loras = [
        LoraConfig(rank=2, targets=TARGETS, ranks=(("down_proj", (5, 0)),)),
        LoraConfig(rank=4, targets=TARGETS, dropout=0.1),
    ]
    wide = members.widest(loras)
    assert (wide.width("q_proj"), wide.width("down_proj"), wide.dropout) == (4, 5, 0.1)
    assert wide.layer_scales("q_proj", 2) == wide.layer_scales("down_proj", 2) == (1.0, 1.0)


def test_cut_takes_away_what_padded_put_behind():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(2.0)}
    shapes = {"a": np.zeros((2, 5)), "b": np.zeros(2)}
    wide = members.padded(tree, shapes)
    assert wide["a"].tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]] and wide["b"].tolist() == [0, 1]
    assert jax.tree.all(jax.tree.map(np.array_equal, members.cut(wide, tree), tree))


def test_the_scale_folded_into_lora_b_is_the_member_in_the_wide_model(params):
    config = MEMBERS[1]
    model, shapes = model_of(config.lora, one_device())
    mask = partition.trainable_mask(shapes, "lora")
    trainable, _ = begin(config, model, mask)
    wide_model, wide_shapes = model_of(members.widest([one.lora for one in MEMBERS]), one_device())
    wide = members.padded(
        jax.device_get(trainable), partition.split(wide_shapes, partition.trainable_mask(wide_shapes, "lora"))[0]
    )
    scales = {target: own.scale for target, own in layer_scalars(config.lora, TINY.layers).items()}
    _, frozen = partition.split({"params": params, "lora": shapes["lora"]}, mask)
    expected = loss_sum(model, trainable, frozen, batch_of(0))
    np.testing.assert_allclose(
        loss_sum(wide_model, members.scaled(wide, scales), frozen, batch_of(0)), expected, rtol=1e-6
    )


def test_rates_are_those_of_the_schedules_one_by_one():
    numbers = members.hyperparams_of(MEMBERS, STEPS, TINY.layers)
    for rates, config in zip(numbers.rates, MEMBERS, strict=True):
        schedule = learning_rate_schedule(config.optim, STEPS)
        np.testing.assert_allclose(rates, [schedule(i) for i in range(STEPS)], rtol=1e-6)
    assert numbers.clip_norm.tolist() == [np.inf, 1.0, np.float32(0.1)]
    assert numbers.adapters["q_proj"].scale.tolist() == [[4.0] * 2, [np.float32(4 / 3**0.5)] * 2, [2.0] * 2]
    assert numbers.adapters["q_proj"].keep_prob.tolist() == [[1.0] * 2, [np.float32(0.8)] * 2, [0.5] * 2]


def test_residuals_are_what_the_backward_pass_keeps():
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert memory.residual_bytes(jnp.sum, x) == 0
    assert memory.residual_bytes(lambda x: jnp.sum(jnp.sin(x)), x) == 8 * 4 * 4  # cos x
    assert memory.free_bytes(one_device()) > 0
