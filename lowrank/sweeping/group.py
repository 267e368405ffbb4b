"""A sweep's group: members that share one compiled step. How many train at once, their programs, their first state.

A group trains in one or more waves of `sweep.group_size` members (wave.py), one after the other, with the same programs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank.config import Config
from lowrank.data.batch import Batch
from lowrank.files import paths
from lowrank.model.decoder import Decoder
from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import compile_once
from lowrank.runs.adapter import Adapter, check_init_adapter, read_init_adapter, refuse_other_layers, with_ranks_of
from lowrank.runs.inputs import RunInputs, check_mesh, initial_variables, prepare, steps_over, with_format
from lowrank.runs.setup import model_of
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member, SweepConfig
from lowrank.training import partition
from lowrank.training.objectives.cross_entropy import CHUNK_TOKENS
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, abstract_state, loss_sum
from lowrank.weights.load import load_params


@dataclasses.dataclass(frozen=True)
class Group:
    """A group before anything is computed."""

    members: tuple[Member, ...]
    inputs: RunInputs
    mesh: Mesh
    model: Decoder  # as wide as the widest member
    shapes: dict  # of one member's variables in that model
    mask: dict
    size: int  # members in one compiled step
    at_once: int  # of these, the members that a device computes side by side
    init_adapter: Adapter | None = None  # that all members start from

    @property
    def config(self) -> Config:
        """The first member's, for what all have in common."""
        return self.members[0].config

    @property
    def count(self) -> int:
        """Members in the stacked state: `size`, padded so that every device has the same number."""
        together = self.mesh.shape["member"] * self.at_once
        return -(-self.size // together) * together

    @property
    def waves(self) -> list[tuple[Member, ...]]:
        return [self.members[i : i + self.size] for i in range(0, len(self.members), self.size)]


def plan(members: list[Member], sweep: SweepConfig, known: dict, workdir: paths.Path | None = None) -> Group:
    """Read what the members name and choose how many train at once. `known` caches what earlier groups have read; the tokens of
    large data are written beside `workdir`."""
    config = members[0].config
    mode = config.train.mode if config.architecture else None  # only from scratch does `prepare` depend on the mode
    key = (config.base, config.architecture, config.tokenizer, config.data, config.eval, mode)
    inputs = known.get(key) or prepare(config, workdir)
    known[key] = inputs = dataclasses.replace(inputs, steps=steps_over(inputs.rows, config))
    members = [dataclasses.replace(m, config=with_format(m.config, inputs.format)) for m in members]
    start = None
    if config.init_adapter:
        start = read_init_adapter(config, inputs.base)
        for member in members[1:]:
            check_init_adapter(start, member.config, inputs.architecture.layers)
        members = [dataclasses.replace(m, config=with_ranks_of(m.config, start.lora)) for m in members]
    config, architecture = members[0].config, inputs.architecture
    mesh = mesh_lib.members_mesh(mesh_lib.make_mesh(config.mesh))
    check_mesh(mesh, config, architecture)
    for member in members:
        refuse_other_layers(member.config.lora, architecture.layers)
    lora = members_lib.widest([m.config.lora for m in members]) if config.adapter else None
    model, shapes = model_of(config, architecture, lora, mesh)
    mask = partition.trainable_mask(shapes, config.train.mode)
    group = Group(tuple(members), inputs, mesh, model, shapes, mask, len(members), 1, start)
    size, at_once = choose_sizes(group, sweep, memory.free_bytes(mesh), mesh.devices.flat[0].platform)
    return dataclasses.replace(group, size=size, at_once=at_once)


def choose_sizes(group: Group, sweep: SweepConfig, free: int, platform: str) -> tuple[int, int]:
    """-> (members in one compiled step, members that a device computes side by side), for `free` bytes per device.

    On a CPU one at a time is fastest (15M shape, 2 rows of 256, CPU seconds per member: 0.31 for one at a time, 0.44 for
    eight: `bench/sweep.py`); elsewhere as many as fit.
    """
    mesh, count = group.mesh, len(group.members)
    lanes, cuts = mesh.shape["member"], mesh.shape["fsdp"] * mesh.shape["tensor"]
    trainable, frozen = partition.split(group.shapes, group.mask)
    # Weights, gradient and two moments, all of them twice: the step makes new ones before the old ones are freed.
    state = 8 * partition.nbytes(trainable) // cuts
    left = max(0, free - partition.nbytes(frozen) // cuts)
    size = sweep.group_size or max(lanes, lanes * int(0.5 * left / state))
    size = -(-count // -(-count // min(size, count)))  # waves of about the same size
    each = -(-size // lanes)
    if sweep.at_once:
        return size, min(sweep.at_once, each)
    if platform == "cpu":
        return size, 1
    fit = int(0.6 * max(0, left - each * state) / activation_bytes(group))
    return size, -(-each // -(-each // max(1, min(fit, each))))


def activation_bytes(group: Group) -> int:
    """An estimate of the bytes that one member's forward and backward pass need on a device, beside weights and state:
    the residuals of a micro-batch, one layer's intermediate values, a chunk's logits and their gradient."""
    config, shards = group.config, mesh_lib.batch_shards(group.mesh)
    rows = config.train.batch_size // config.train.microbatches
    trainable, frozen = partition.split(group.shapes, group.mask)

    def kept(rows: int, remat: str) -> int:
        model, shape = group.model.clone(remat=remat), (rows, config.data.max_length)

        def loss(trainable):
            weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), frozen)
            batch = Batch(*[jnp.zeros(shape, jnp.int32)] * 4, loss_mask=jnp.zeros(shape, jnp.bool_))
            return loss_sum(model, trainable, weights, batch)

        return memory.residual_bytes(loss, trainable)

    # Differences between row counts, because residuals include the weights, which all members share.
    layer = (kept(2 * rows, "none") - kept(rows, "none")) // group.inputs.architecture.layers
    whole = kept(2 * rows, config.remat) - kept(rows, config.remat)
    tokens = min(CHUNK_TOKENS, rows // shards * config.data.max_length)
    return (whole + layer) // shards + 2 * tokens * group.inputs.architecture.vocab * 4


class Programs:
    """A group's jitted steps and the layout of its stacked state, made once for all of its waves."""

    def __init__(self, group: Group):
        config, mesh = group.config, group.mesh
        self.group = group
        trainable, _ = partition.split(group.shapes, group.mask)
        schedule = learning_rate_schedule(config.optim, group.inputs.steps)
        self.optimizer = make_optimizer(config.optim, schedule, group.mask)
        self.layout = members_lib.stacked_shapes(abstract_state(self.optimizer, trainable, mesh), group.count, mesh)
        self.jitted_step = members_lib.make_members_step(group.model, config, group.mask, self.layout, group.at_once)
        self.step = compile_once(self.jitted_step)
        self.eval_step = members_lib.make_members_eval_step(group.model, group.at_once)
        self.init = jax.jit(jax.vmap(self.optimizer.init), out_shardings=shardings_of(self.layout.opt_state))


def shardings_of(shapes):
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def initial_state(group: Group, programs: Programs, wave: tuple[Member, ...]) -> State:
    """The members' states before step 1; each equals that of the same run alone."""
    layout, begun = programs.layout, pad_members(initial_trainables(group, wave), group.count)
    trainable = jax.device_put(begun, shardings_of(layout.trainable))
    step = jax.device_put(jnp.zeros(group.count, jnp.int32), layout.step.sharding)
    return State(step, trainable, programs.init(trainable), member_keys(group, programs, wave))


def initial_trainables(group: Group, wave: tuple[Member, ...]):
    """The members' trainable trees, stacked [members of the wave, …]."""
    config, base = group.config, group.inputs.base
    if config.train.mode == "full" and base:  # all start from the base
        shared, _ = partition.split({"params": load_params(base, group.shapes["params"])}, group.mask)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(wave)), shared)
    collection = "params" if config.train.mode == "full" else "lora"
    wide, begun = partition.split(group.shapes, group.mask)[0], []
    for member in wave:
        model, shapes = own_model(group, member)
        made = initial_variables(member.config, model, base, shapes, {collection}, group.init_adapter)
        own, _ = partition.split(made, group.mask)
        begun.append(members_lib.padded(jax.device_get(own), wide))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *begun)


def own_model(group: Group, member: Member) -> tuple[Decoder, dict]:
    """-> (the model of the member alone, the shapes of its variables)."""
    return model_of(member.config, group.inputs.architecture, member.config.adapter, group.mesh)


def member_keys(group: Group, programs: Programs, wave: tuple[Member, ...]) -> jax.Array:
    seeds = [member.config.seed for member in wave]
    keys = jax.vmap(jax.random.key)(np.uint32(seeds + seeds[:1] * (group.count - len(wave))))
    return jax.device_put(keys, programs.layout.key.sharding)


def pad_members(tree, count: int):
    """Stacked leaves, padded to `count` members with copies of the first one, whose results are discarded."""
    padding = lambda leaf: jnp.repeat(leaf[:1], count - len(leaf), axis=0)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, padding(leaf)]) if len(leaf) < count else leaf, tree)
