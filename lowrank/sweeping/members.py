"""Many members over one frozen base in one compiled step: what a sweep trains, stacked.

The members' factors are padded with zeros to the largest rank. Where lora_a and lora_b are both zero, neither has a gradient,
Adam leaves both unchanged, and x A B is the same sum. Every leaf of the state then has a leading axis of members; scale, rates,
clip, decay and dropout are arrays beside it; and the update of a run alone is vmapped over that axis, with the base unmapped.

Each device computes `at_once` members side by side, which share each product with the base; groups of them follow one after
another and share the memory of one run's activations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import LayerScalars, layer_scalars
from lowrank.config import Config
from lowrank.data.batch import Batch
from lowrank.model.decoder import Decoder
from lowrank.parallel.compiling import device_of, jit
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, loss_sum, make_update


class MemberHyperparams(NamedTuple):
    """The members' hyperparameters, which no step changes; every leaf has a leading axis of members."""

    rates: jax.Array  # float32 [members, steps], the learning rate of each step
    weight_decay: jax.Array  # float32 [members]
    clip_norm: jax.Array  # float32 [members], infinity where it is off
    # Of each target: scale, rank and kept [members, layers]; None in mode "full".
    adapters: dict[str, LayerScalars] | None


def widest(loras: list[LoraConfig]) -> LoraConfig:
    """The adapter into which each of these fits: as wide as the widest, with a scale of 1."""
    widths = {target: max(lora.width(target) for lora in loras) for target in loras[0].targets}
    return LoraConfig(
        rank=max(widths.values()),
        targets=loras[0].targets,
        dropout=max(lora.dropout for lora in loras),
        ranks=tuple((target, (width,)) for target, width in widths.items()),
        alphas=tuple((target, (float(width),)) for target, width in widths.items()),
    )


def hyperparams_of(configs: list[Config], steps: int, layers: int) -> MemberHyperparams:
    """The members' hyperparameters, as arrays on the host."""
    step = jnp.arange(steps)
    schedules = [learning_rate_schedule(config.optim, steps) for config in configs]
    of_layers = []
    for lora in [config.lora for config in configs if config.adapter]:
        kept = jnp.full(layers, 1 - lora.dropout, jnp.float32)
        of_layers.append({name: own._replace(keep_prob=kept) for name, own in layer_scalars(lora, layers).items()})
    return MemberHyperparams(
        # Evaluated here and not in the step, so that schedules may differ in every way, in their kind too.
        rates=np.stack([np.broadcast_to(jax.vmap(schedule)(step), steps) for schedule in schedules]).astype(np.float32),
        weight_decay=np.float32([config.optim.weight_decay for config in configs]),
        clip_norm=np.float32([config.optim.clip_norm or np.inf for config in configs]),
        adapters=jax.tree.map(lambda *leaves: np.stack(leaves), *of_layers) if of_layers else None,
    )


def stacked_shapes(shapes, members: int, mesh: Mesh):
    """One member's ShapeDtypeStructs -> all members', with their axis over the mesh axis `member`."""

    def stacked(leaf):
        spec = PartitionSpec("member", *leaf.sharding.spec)
        return jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(stacked, shapes)


def padded(tree, shapes):
    """Pad each leaf with zeros at the end of every axis to its shape in `shapes`; the inverse of `cut`."""
    return jax.tree.map(
        lambda leaf, wanted: np.pad(leaf, [(0, n - m) for m, n in zip(leaf.shape, wanted.shape, strict=True)]),
        tree,
        shapes,
    )


def cut(tree, shapes):
    """Cut each leaf along every axis to its shape in `shapes`."""
    return jax.tree.map(lambda leaf, wanted: leaf[tuple(slice(n) for n in wanted.shape)], tree, shapes)


def scaled(trainable: dict, scales: dict[str, jax.Array]) -> dict:
    """One member's trainable tree with each target's scale [layers] folded into its lora_b."""

    def one(path, leaf):
        *_, target, name = (part.key for part in path)
        return leaf * scales[target][:, None, None] if name == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(one, trainable)


def make_members_step(model: Decoder, config: Config, mask: dict, layout: State, at_once: int):
    """-> jitted (state, hyperparams, frozen, batch, step) -> (state, StepMetrics), whose leaves have a leading axis of members.

    `step`: updates made so far. A member whose loss or gradient is not finite is not updated at that step, nor at any later
    one: its own `state.step` then lags behind. `state` is donated.
    """

    def one(state: State, hyperparams: MemberHyperparams, frozen: dict, batch: Batch, step):
        schedule = lambda count: hyperparams.rates[count]  # noqa: E731
        optimizer = make_optimizer(
            config.optim, schedule, mask, clip_norm=hyperparams.clip_norm, weight_decay=hyperparams.weight_decay
        )
        update = make_update(model, optimizer, schedule, config.train.microbatches, hyperparams.adapters)
        updated, metrics = update(state, frozen, batch)
        goes_on = (state.step == step) & jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        kept = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), updated[:3], state[:3])
        return State(kept[0], kept[1], kept[2], state.key), metrics

    def members_step(state, hyperparams, frozen, batch, step):
        return _mapped(lambda state, own: one(state, own, frozen, batch, step), at_once, state, hyperparams)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jit(members_step, device_of(layout), donate_argnums=0, out_shardings=(shardings, None))


def make_members_eval_step(model: Decoder, at_once: int):
    """-> jitted (trainable, hyperparams, frozen, batch) -> (summed losses [members], trained tokens of the batch)."""

    def members_eval_step(trainable, hyperparams, frozen, batch):
        loss = lambda trainable, adapters: loss_sum(model, trainable, frozen, batch, adapters=adapters)  # noqa: E731
        losses = _mapped(loss, at_once, trainable, hyperparams.adapters)
        return losses, jnp.sum(batch.loss_mask, dtype=jnp.int32)

    return jit(members_eval_step)


def _mapped(function, at_once: int, *trees):
    """Map `function` over the leading axis, `at_once` members of each device at a time."""
    mapped = jax.vmap(function, spmd_axis_name="member")
    members = len(jax.tree.leaves(trees)[0])
    lanes = jax.sharding.get_abstract_mesh().shape["member"]
    chunks = members // (lanes * at_once)
    if chunks == 1:
        return mapped(*trees)

    # Device d holds the members from d * members / lanes on; chunk i is the i-th part of each device's own.
    def in_chunks(leaf):
        parts = leaf.reshape(lanes, chunks, at_once, *leaf.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(chunks, lanes * at_once, *leaf.shape[1:])

    def together(leaf):
        parts = leaf.reshape(chunks, lanes, at_once, *leaf.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(members, *leaf.shape[2:])

    _, results = jax.lax.scan(lambda _, part: (None, mapped(*part)), None, jax.tree.map(in_chunks, trees))
    return jax.tree.map(together, results)
