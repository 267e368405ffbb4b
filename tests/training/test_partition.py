"""The mask, the two trees with holes, and the optimizer that is made from the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer


def variables():
    return {
        "params": {"a": {"kernel": np.int32(1), "scale": np.int32(2)}, "b": {"kernel": np.int32(3)}},
        "lora": {"a": {"lora_a": np.int32(4), "lora_b": np.int32(5)}},
    }


def test_mask_of_each_mode():
    off = {"params": {"a": {"kernel": False, "scale": False}, "b": {"kernel": False}}}
    assert partition.trainable_mask(variables(), "lora") == {**off, "lora": {"a": {"lora_a": True, "lora_b": True}}}
    full = {"params": variables()["params"]}
    assert partition.trainable_mask(full, "full") == {
        "params": {"a": {"kernel": True, "scale": True}, "b": {"kernel": True}}
    }


def test_split_and_merge_are_exact_inverses():
    tree = variables()
    trainable, frozen = partition.split(tree, partition.trainable_mask(tree, "lora"))
    assert jax.tree.leaves(trainable) == [4, 5]
    assert jax.tree.leaves(frozen) == [1, 2, 3]
    assert partition.merge(trainable, frozen) == tree
    assert partition.merge(frozen, trainable) == tree


def test_names_and_counts_leave_the_holes_out():
    trainable, _ = partition.split(variables(), partition.trainable_mask(variables(), "lora"))
    assert partition.named_leaves(trainable) == {"lora/a/lora_a": 4, "lora/a/lora_b": 5}
    leaf = jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)
    assert (partition.count({"x": leaf, "y": None}), partition.nbytes({"x": leaf, "y": None})) == (15, 30)


def test_misfits_lists_all():
    found = {"x": np.zeros((2, 3)), "extra": np.zeros(1)}
    wanted = {"x": np.zeros((2, 4)), "lost": np.zeros(5)}
    assert partition.misfits(found, wanted) == [
        "extra is (1,) there and absent here",
        "lost is absent there and (5,) here",
        "x is (2, 3) there and (2, 4) here",
    ]


def arrays(tree):
    return jax.tree.map(lambda x: jnp.full((3,), float(x)), tree)


def test_frozen_leaves_have_no_state_and_do_not_move():
    tree = arrays(variables())
    mask = partition.trainable_mask(tree, "lora")
    config = OptimConfig(weight_decay=0.5, clip_norm=0.0)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), mask)
    trainable, _ = partition.split(tree, mask)
    names = partition.named_leaves(optimizer.init(trainable))
    assert sum("/mu/" in name for name in names) == 2
    assert not any("params" in name for name in names)
    # And whoever hands in a whole tree with gradients for the base as well does not move it either.
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates["params"]))
    assert all(leaf.all() for leaf in jax.tree.leaves(updates["lora"]))


def test_norms_and_biases_are_not_decayed():
    tree = arrays({"params": variables()["params"]})
    tree["params"]["b"]["bias"] = jnp.full((3,), 6.0)
    optimizer = make_optimizer(
        OptimConfig(weight_decay=0.5), optax.constant_schedule(0.1), partition.trainable_mask(tree, "full")
    )
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    assert not updates["params"]["a"]["scale"].any()
    assert not updates["params"]["b"]["bias"].any()
    np.testing.assert_allclose(updates["params"]["a"]["kernel"], -0.1 * 0.5 * 1.0)
    np.testing.assert_allclose(updates["params"]["b"]["kernel"], -0.1 * 0.5 * 3.0)


def test_updates_equal_torchs_adamw_with_clipping():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(5, 4, 3)).astype(np.float32)
    tree = {"lora": {"lora_a": jnp.asarray(start)}}
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0, b1=0.8, b2=0.95, eps=1e-6)
    optimizer = make_optimizer(config, optax.constant_schedule(0.01), partition.trainable_mask(tree, "lora"))
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    state = optimizer.init(tree)
    for gradient in gradients:
        updates, state = optimizer.update({"lora": {"lora_a": jnp.asarray(gradient)}}, state, tree)
        tree = optax.apply_updates(tree, updates)
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adamw.step()
    # float32 in two orders of operations, five steps of 0.01.
    np.testing.assert_allclose(tree["lora"]["lora_a"], theirs.detach().numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("linear", 1, [1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 2, [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_schedules(schedule, warmup, expected):
    config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    schedule = learning_rate_schedule(config, steps=6)
    np.testing.assert_allclose([schedule(step) for step in range(6)], expected, rtol=1e-6)  # float32


def test_a_warm_up_of_a_share_of_the_steps_is_that_many_rounded_up():
    ratio, steps = (OptimConfig(schedule="cosine", **own) for own in ({"warmup_ratio": 0.26}, {"warmup_steps": 3}))
    assert [ratio.warmup(10), ratio.warmup(100), OptimConfig(warmup_ratio=0.0).warmup(10)] == [3, 26, 0]
    found, expected = (learning_rate_schedule(config, 10) for config in (ratio, steps))
    assert [float(found(step)) for step in range(10)] == [float(expected(step)) for step in range(10)]
