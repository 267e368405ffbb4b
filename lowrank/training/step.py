"""One training step and one evaluation step: pure functions of the two trees with holes and a batch.

Gradients exist for the trainable tree alone; the frozen tree is an argument that nothing is differentiated by and that is
never donated. Steps run under `jax.set_mesh`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank.data.batch import Batch
from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import device_of, jit
from lowrank.parallel.mesh import constrain
from lowrank.training import partition
from lowrank.training.objectives.cross_entropy import cross_entropy_sum, token_losses


class State(NamedTuple):
    """What a step changes and a checkpoint holds."""

    step: Any  # int32 scalar, updates made so far
    trainable: dict  # the variables, with holes where they are frozen
    opt_state: optax.OptState
    key: Any  # the run's random key; each step folds its number in, so a resumed run draws the same numbers


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device; with a leading axis of members in a sweep."""

    loss: jax.Array  # float32, mean over the trained tokens of all micro-batches
    grad_norm: jax.Array  # float32, of the trainable gradient before clipping
    learning_rate: jax.Array  # float32
    trained_tokens: jax.Array  # int32
    tokens: jax.Array  # int32, without padding


def abstract_state(optimizer: optax.GradientTransformation, trainable: dict, mesh: Mesh) -> State:
    """Shapes, dtypes and layouts of the state over `trainable` (arrays or their shapes): a moment lies as its parameter does.

    Explicit, because by default moments are replicated, and the second step compiles again: the first step's results lie
    elsewhere than its arguments did.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    layouts = {name: leaf.sharding for name, leaf in partition.named_leaves(trainable).items()}

    def with_sharding(path, leaf):
        name = partition.path_name(path)
        sharding = next((sharding for own, sharding in layouts.items() if name.endswith(f"/{own}")), replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(
        lambda trainable: State(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(0)), trainable
    )
    return jax.tree_util.tree_map_with_path(with_sharding, shapes)


def init_state(optimizer: optax.GradientTransformation, trainable: dict, key: jax.Array, layout: State) -> State:
    """The state before step 1, laid out as `layout` (from `abstract_state`)."""
    opt_layout = jax.tree.map(lambda leaf: leaf.sharding, layout.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_layout)(trainable)
    step = mesh_lib.put(np.int32(0), layout.step.sharding)
    return State(step, trainable, opt_state, mesh_lib.put(key, layout.key.sharding))


def loss_sum(
    model: Decoder, trainable: dict, frozen: dict, batch: Batch, dropout_key=None, adapters: dict | None = None
) -> jax.Array:
    """float32 scalar: summed loss of the batch's trained tokens. A `dropout_key` turns dropout on.

    `adapters` (LayerScalars of each target) replace the scales of `model.lora`.
    """
    hidden, head, _ = model.apply(
        partition.merge(trainable, frozen),
        batch.inputs,
        batch.positions,
        batch.segment_ids,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        adapters=adapters,
    )
    with jax.named_scope("loss"):
        return cross_entropy_sum(hidden, head, batch.targets, batch.loss_mask)


def make_train_step(model: Decoder, optimizer, schedule, microbatches: int, state: State):
    """-> jitted (state, frozen, batch) -> (state, StepMetrics). `state` is donated; metrics stay on the device.

    The new state is laid out as the given `state` (arrays or their shapes).
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = make_update(model, optimizer, schedule, microbatches)
    return jit(train_step, device_of(state), donate_argnums=0, out_shardings=(layout, None))


def make_update(model: Decoder, optimizer, schedule, microbatches: int, adapters: dict | None = None):
    """-> (state, frozen, batch) -> (state, StepMetrics): the step as a function to be jitted, or mapped over members."""
    dropout = model.lora is not None and model.lora.dropout > 0

    def train_step(state: State, frozen: dict, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)

        def add(sums, part):
            index, microbatch = part
            microbatch = Batch(*(constrain(x, "batch", "length") for x in microbatch))
            dropout_key = jax.random.fold_in(key, index) if dropout else None
            loss, gradient = jax.value_and_grad(
                lambda trainable: loss_sum(model, trainable, frozen, microbatch, dropout_key, adapters)
            )(state.trainable)
            return jax.tree.map(jnp.add, sums, (loss, gradient)), None

        # Row i of the batch goes to micro-batch i mod `microbatches`: each micro-batch is then spread over all devices
        # as the batch is, and no row moves.
        parts = Batch(*(x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1) for x in batch))
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
        (loss, gradient), _ = jax.lax.scan(add, zero, (jnp.arange(microbatches), parts))
        trained = jnp.sum(batch.loss_mask, dtype=jnp.int32)
        divisor = jnp.maximum(trained, 1).astype(jnp.float32)
        loss, gradient = loss / divisor, jax.tree.map(lambda g: g / divisor, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.int32)
        metrics = StepMetrics(loss, optax.tree.norm(gradient), schedule(state.step), trained, tokens)
        return State(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def make_eval_step(model: Decoder):
    """-> jitted (trainable, frozen, batch) -> (summed loss, trained tokens), to be summed over all batches."""

    def eval_step(trainable: dict, frozen: dict, batch: Batch):
        return loss_sum(model, trainable, frozen, batch), jnp.sum(batch.loss_mask, dtype=jnp.int32)

    return jit(eval_step)


def make_losses_step(model: Decoder):
    """-> jitted (variables, batch) -> float32 [B, T]: each trained token's loss, 0 for the others."""

    def losses_step(variables: dict, batch: Batch):
        hidden, head, _ = model.apply(variables, batch.inputs, batch.positions, batch.segment_ids)
        return token_losses(hidden, head, batch.targets, batch.loss_mask)

    return jit(losses_step)
