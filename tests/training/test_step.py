"""The objective and the step: sums and counts, gradients of the trainable tree alone, eight devices as one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.data.batch import Batch
from lowrank.families.config import ModelConfig
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.training import partition
from lowrank.training.objectives import cross_entropy as objective
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from lowrank.training.step import abstract_state, init_state, make_eval_step, make_train_step

CONFIG = ModelConfig(vocab=64, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8)
# A projection that is cut by its columns and one by its rows: fewer of them halve the time that compiling takes.
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
MODEL = Decoder(CONFIG, LORA)
OPTIM = OptimConfig(learning_rate=0.01, weight_decay=0.1)
ROWS, LENGTH = 8, 12  # short enough for attention to go at once: half the compile time


def make_batch(seed=0, rows=ROWS):
    """Rows with two packed examples and padding, and very unequal counts of trained tokens."""
    rng = np.random.default_rng(seed)
    first = rng.integers(2, 7, rows)
    total = first + rng.integers(1, LENGTH - 6, rows)
    slots = np.arange(LENGTH)[None]
    segments = np.where(slots < first[:, None], 1, np.where(slots < total[:, None], 2, 0))
    positions = np.where(segments == 2, slots - first[:, None], slots)
    return Batch(
        inputs=rng.integers(0, 64, (rows, LENGTH)).astype(np.int32),
        targets=rng.integers(0, 64, (rows, LENGTH)).astype(np.int32),
        positions=positions.astype(np.int32),
        segment_ids=segments.astype(np.int32),
        loss_mask=(segments > 0) & (rng.random((rows, LENGTH)) < np.linspace(0.05, 1, rows)[:, None]),
    )


@pytest.fixture(scope="module")
def variables():
    fresh = running.init(MODEL)
    # lora_b away from zero: else the gradient of lora_a is zero and proves nothing.
    return fresh | {"lora": jax.tree.map(lambda leaf: leaf + 0.1, fresh["lora"])}


@pytest.fixture(scope="module")
def plain(variables):
    """Two steps on one device, in one micro-batch."""
    return run_steps(variables)


@pytest.fixture(scope="module")
def evaluate():
    return make_eval_step(MODEL)


def run_steps(variables, *, model=MODEL, microbatches=1, mode="lora", mesh=None, steps=2, step=None):
    """-> (trained variables, metrics of each step, the jitted step). `step` is one of the same run, if there was one."""
    mesh = mesh or mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes, axes = decoder.abstract(model)
    layout = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.with_shardings(mesh, axes, shapes))
    variables = {name: jax.tree.map(jnp.copy, variables[name]) for name in shapes}
    variables = jax.device_put(variables, layout)
    mask = partition.trainable_mask(variables, mode)
    trainable, frozen = partition.split(variables, mask)
    schedule = learning_rate_schedule(OPTIM, steps)
    optimizer = make_optimizer(OPTIM, schedule, mask)
    layout = abstract_state(optimizer, trainable, mesh)
    state = init_state(optimizer, trainable, jax.random.key(0), layout)
    for name, leaf in partition.named_leaves(state.opt_state).items():
        own = next((x for own, x in partition.named_leaves(trainable).items() if name.endswith(own)), None)
        assert own is None or leaf.sharding == own.sharding, name
    step = step or make_train_step(model, optimizer, schedule, microbatches, layout)
    history = []
    for seed in range(steps):
        batch = jax.device_put(make_batch(seed), NamedSharding(mesh, mesh_lib.spec(("batch", "length"))))
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return partition.merge(state.trainable, frozen), history, step


def close(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("chunk_tokens", [24, 40, 1000])  # three columns, five (the last is padded), all at once
def test_chunked_loss_and_gradients_equal_dense(chunk_tokens, monkeypatch):
    monkeypatch.setattr(objective, "CHUNK_TOKENS", chunk_tokens)
    batch = make_batch()
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, 32)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)

    def dense(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(batch.loss_mask, picked, 0))

    def chunked(hidden, head):
        return objective.cross_entropy_sum(hidden, head, batch.targets, batch.loss_mask)

    expected, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head) for f in (dense, chunked))
    close(found, expected, 1e-4)  # sums of some hundred float32 terms of about 10


def test_loss_of_nothing_is_zero():
    batch = make_batch()
    nothing = jnp.zeros((ROWS, LENGTH), bool)
    hidden = jnp.ones((ROWS, LENGTH, 32))
    run = jax.jit(jax.value_and_grad(objective.cross_entropy_sum))
    value, gradient = run(hidden, jnp.ones((32, 64)), batch.targets, nothing)
    assert value == 0
    assert not gradient.any()


def test_loss_equals_torchs_cross_entropy(variables, plain):
    torch = pytest.importorskip("torch")
    batch = make_batch()
    run = jax.jit(lambda variables: MODEL.apply(variables, batch.inputs, batch.positions, batch.segment_ids))
    hidden, head, _ = run(variables)
    logits = torch.tensor(np.asarray(hidden) @ np.asarray(head))
    targets = torch.tensor(np.where(batch.loss_mask, batch.targets, -100)).long()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    _, history, _ = plain
    assert history[0].loss == pytest.approx(expected.item(), rel=1e-5)
    assert history[0].trained_tokens == batch.loss_mask.sum()
    assert history[0].tokens == (batch.segment_ids > 0).sum()


def test_accumulated_equals_full_batch(variables, plain):
    close(run_steps(variables, microbatches=4)[:2], plain[:2])


def test_eight_devices_equal_one(variables, plain):
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))  # others: tests/parallel/test_sharding.py
    found, history, _ = run_steps(variables, mesh=mesh)
    expected, expected_history, _ = plain
    close(history, expected_history)
    close(found, expected)
    shapes, axes = decoder.abstract(MODEL)
    layout = partition.named_leaves(mesh_lib.with_shardings(mesh, axes, shapes))
    for name, leaf in partition.named_leaves(found).items():
        assert leaf.sharding.is_equivalent_to(layout[name].sharding, leaf.ndim), name


def test_base_stays_and_every_adapter_leaf_moves(variables, plain):
    trained, _, _ = plain  # with weight decay
    jax.tree.map(np.testing.assert_array_equal, trained["params"], variables["params"])
    for name, leaf in partition.named_leaves(trained["lora"]).items():
        before = partition.named_leaves(variables["lora"])[name]
        assert (leaf != before).any(axis=(1, 2)).all(), name  # in every layer


@pytest.mark.slow
def test_full_mode_moves_every_leaf(variables):
    trained, history, _ = run_steps(variables, model=dataclasses.replace(MODEL, lora=None), mode="full")
    assert set(trained) == {"params"}
    for name, leaf in partition.named_leaves(trained["params"]).items():
        assert (leaf != partition.named_leaves(variables["params"])[name]).any(), name
    assert history[1].loss != history[0].loss


def test_no_gradient_of_the_base_is_computed(variables):
    """The norm of the gradient, which takes part in the clip, is that of the adapter's leaves; and no dW is in the program."""
    mask = partition.trainable_mask(variables, "lora")
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    trainable, frozen = partition.split(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), mask)
    schedule = learning_rate_schedule(OPTIM, 2)
    optimizer = make_optimizer(OPTIM, schedule, mask)
    layout = abstract_state(optimizer, trainable, mesh)
    state = init_state(optimizer, trainable, jax.random.key(0), layout)
    step = make_train_step(MODEL, optimizer, schedule, 1, layout)
    outputs = jax.eval_shape(step, state, frozen, make_batch())
    assert partition.count(outputs[0].trainable) == partition.count(variables["lora"])
    text = step.lower(state, frozen, make_batch()).compile().as_text()
    # A weight gradient of gate_proj contracts batch and length into [embed, mlp] = [32, 48]; the adapter's never has that shape.
    products = [line for line in text.splitlines() if " dot(" in line and "f32[32,48]" in line.split(" dot(")[0]]
    assert products == []


def test_the_step_compiles_once(plain):
    assert plain[2]._cache_size() == 1


@pytest.mark.slow
def test_dropout_draws_by_step_and_microbatch_and_is_off_in_evaluation(variables, plain, evaluate):
    model = dataclasses.replace(MODEL, lora=dataclasses.replace(LORA, dropout=0.5))
    _, first, step = run_steps(variables, model=model)
    _, again, _ = run_steps(variables, model=model, step=step)
    assert first[0].loss == again[0].loss
    assert first[0].loss != plain[1][0].loss
    trainable, frozen = partition.split(variables, partition.trainable_mask(variables, "lora"))
    batch = make_batch()
    still, dropped = (run(trainable, frozen, batch)[0] for run in (evaluate, make_eval_step(model)))
    assert still == dropped


def test_evaluation_sums_do_not_depend_on_the_batches(variables, evaluate):
    trainable, frozen = partition.split(variables, partition.trainable_mask(variables, "lora"))
    batch = make_batch()
    whole = evaluate(trainable, frozen, batch)
    halves = [evaluate(trainable, frozen, Batch(*(x[part] for x in batch))) for part in (slice(0, 4), slice(4, 8))]
    assert whole[1] == halves[0][1] + halves[1][1]
    assert float(whole[0]) == pytest.approx(float(halves[0][0] + halves[1][0]), rel=1e-6)


@pytest.mark.slow
def test_bfloat16_step_stays_near_float32(variables, plain):
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    low = {**variables, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])}
    trained, history, _ = run_steps(low, model=model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained["lora"]))
    expected = plain[1]
    # bfloat16 has 8 bits: 0.4 % a rounding, a few of them in a row.
    np.testing.assert_allclose([h.loss for h in history], [h.loss for h in expected], rtol=2e-2)
