"""One training step, and one evaluation step: pure functions of the two trees with holes and a batch.

A batch is a dict of `[rows, length]` arrays: inputs, targets, positions, segment_ids, loss_mask. Gradients exist for
the trainable tree alone; the frozen tree is an argument that nothing is differentiated by and that is never donated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import jit, platform_of
from lowrank.parallel.mesh import constrain
from lowrank.training import partition
from lowrank.training.objectives.cross_entropy import cross_entropy_sum, token_losses


class State(NamedTuple):
    """What a step changes, and what a checkpoint holds."""

    step: jax.Array  # int32, updates made so far
    trainable: dict  # the variables, with holes where they are frozen
    opt_state: optax.OptState
    key: jax.Array  # of the whole run; a step folds its number in, so a resumed run draws the same


def abstract_state(optimizer: optax.GradientTransformation, trainable: dict, mesh: Mesh) -> State:
    """Shapes, dtypes and layouts of the state over `trainable` (arrays or their shapes): a moment as the leaf it belongs to.

    Said explicitly: left to itself, a moment lies whole on every device, and the second step compiles anew because
    the first one's results lie elsewhere than its arguments did.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    layouts = {name: leaf.sharding for name, leaf in partition.named_leaves(trainable).items()}

    def laid_out(path, leaf):
        name = partition.path_name(path)
        sharding = next((sharding for own, sharding in layouts.items() if name.endswith(f"/{own}")), whole)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(
        lambda trainable: State(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(0)), trainable
    )
    return jax.tree_util.tree_map_with_path(laid_out, shapes)


def init_state(optimizer: optax.GradientTransformation, trainable: dict, key: jax.Array, layout: State) -> State:
    """The state before step 1, as `layout` (from `abstract_state`) says."""
    opt_layout = jax.tree.map(lambda leaf: leaf.sharding, layout.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_layout)(trainable)
    step = mesh_lib.put(np.int32(0), layout.step.sharding)
    return State(step, trainable, opt_state, mesh_lib.put(key, layout.key.sharding))


def loss_sum(
    model: Decoder, trainable: dict, frozen: dict, batch: dict, shards: int, dropout_key=None, adapters=None
) -> jax.Array:
    """float32 scalar: summed loss of the batch's trained tokens. With a `dropout_key`, in training mode."""
    hidden, head, _ = model.apply(
        partition.merge(trainable, frozen),
        batch["inputs"],
        batch["positions"],
        batch["segment_ids"],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        adapters=adapters,
    )
    return cross_entropy_sum(hidden, head, batch["targets"], batch["loss_mask"], shards)


def make_train_step(model: Decoder, optimizer, schedule, microbatches: int, shards: int, state: State):
    """-> jitted (state, frozen, batch) -> (state, metrics). `state` is donated; metrics stay on the device.

    The state that comes out lies as the given `state` (arrays or their shapes) does.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = make_update(model, optimizer, schedule, microbatches, shards)
    return jit(train_step, platform_of(state), donate_argnums=0, out_shardings=(layout, None))


def make_update(model: Decoder, optimizer, schedule, microbatches: int, shards: int, adapters=None):
    """-> (state, frozen, batch) -> (state, metrics), the step as a function to be jitted or mapped over members.

    `adapters` (of each target, an Own) stands in for the scales of `model.lora`.
    """
    dropout = model.lora is not None and model.lora.dropout > 0

    def accumulate(trainable, frozen, key, batch):
        """Summed loss, summed gradient and trained tokens over the micro-batches."""

        def add(carry, part):
            index, microbatch = part
            microbatch = {name: constrain(x, "batch", "length") for name, x in microbatch.items()}
            dropout_key = jax.random.fold_in(key, index) if dropout else None
            loss, gradient = jax.value_and_grad(
                lambda trainable: loss_sum(model, trainable, frozen, microbatch, shards, dropout_key, adapters)
            )(trainable)
            return jax.tree.map(jnp.add, carry, (loss, gradient)), None

        # Row i of the batch goes to micro-batch i mod `microbatches`: so each micro-batch is spread over all devices
        # as the batch is, and no row has to move.
        parts = {name: x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1) for name, x in batch.items()}
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        (loss, gradient), _ = jax.lax.scan(add, zero, (jnp.arange(microbatches), parts))
        return loss, gradient

    def train_step(state: State, frozen: dict, batch: dict):
        key = jax.random.fold_in(state.key, state.step)
        loss, gradient = accumulate(state.trainable, frozen, key, batch)
        trained = jnp.sum(batch["loss_mask"], dtype=jnp.int32)
        divisor = jnp.maximum(trained, 1).astype(jnp.float32)
        loss, gradient = loss / divisor, jax.tree.map(lambda g: g / divisor, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
            "trained_tokens": trained,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
        }
        return State(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def make_eval_step(model: Decoder, shards: int):
    """-> jitted (trainable, frozen, batch) -> (summed loss, trained tokens), to be added up over all batches."""

    def eval_step(trainable: dict, frozen: dict, batch: dict):
        loss = loss_sum(model, trainable, frozen, batch, shards)
        return loss, jnp.sum(batch["loss_mask"], dtype=jnp.int32)

    return jit(eval_step)


def make_losses_step(model: Decoder, shards: int):
    """-> jitted (variables, batch) -> float32 [rows, length]: each trained token's loss, 0 for the others."""

    def losses_step(variables: dict, batch: dict):
        hidden, head, _ = model.apply(variables, batch["inputs"], batch["positions"], batch["segment_ids"])
        return token_losses(hidden, head, batch["targets"], batch["loss_mask"], shards)

    return jit(losses_step)
