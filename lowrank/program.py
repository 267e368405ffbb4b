"""The training step of a config as a program: everything about it that needs no weights, and the program compiled for
devices that need not be here.

It is the real step: the same model, mask, optimizer, layouts and jit as `lowrank.train` runs, of shapes instead of arrays.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from lowrank.config import Config
from lowrank.model import attend, decoder
from lowrank.model.architecture import ModelConfig
from lowrank.model.decoder import Decoder
from lowrank.model.lora import LoraConfig
from lowrank.parallel import compiling
from lowrank.parallel import mesh as mesh_lib
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import BATCH_KEYS, State, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step before there are arrays; leaves of trees are ShapeDtypeStructs that know their layout."""

    mesh: Mesh
    model: Decoder
    shapes: dict  # of all variables
    mask: dict  # which of them are trained
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    state: State
    frozen: dict
    batch: dict
    function: typing.Callable  # jitted (state, frozen, batch) -> (state, metrics)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs, as the compiler lays them out."""

    base: int
    adapter: int  # in mode "full": the model, which is trained
    optimizer: int
    other: int  # the batch, the run's key, and what the layout of arrays in tiles adds to all of these
    temporaries: int  # activations, gathered kernels, gradients
    program: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def abstract_step(config: Config, architecture: ModelConfig, mesh: Mesh, steps: int) -> Step:
    """What `lowrank.train` sets up before it loads anything, for a run of so many steps."""
    model, shapes = model_of(config, architecture, config.adapted, mesh)
    mask = partition.trainable_mask(shapes, config.train.mode)
    trainable, frozen = partition.split(shapes, mask)
    schedule = learning_rate_schedule(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule, mask)
    state = abstract_state(optimizer, trainable, mesh)
    shards = mesh_lib.batch_shards(mesh)
    function = make_train_step(model, optimizer, schedule, config.train.microbatches, shards, state)
    layout = NamedSharding(mesh, mesh_lib.spec(("batch", "length")))
    rows = (config.train.batch_size, config.data.max_length)
    batch = {
        key: jax.ShapeDtypeStruct(rows, jnp.bool_ if key == "loss_mask" else jnp.int32, sharding=layout)
        for key in BATCH_KEYS
    }
    return Step(mesh, model, shapes, mask, schedule, optimizer, state, frozen, batch, function)


def model_of(config: Config, architecture: ModelConfig, lora: LoraConfig | None, mesh: Mesh) -> tuple[Decoder, dict]:
    """-> the model with this adapter, and its variables' shapes, laid out."""
    # What is trained is held in float32: bfloat16 would swallow small updates.
    param_dtype = jnp.dtype("float32" if config.train.mode == "full" else config.param_dtype)
    device, dtype = mesh.devices.flat[0], jnp.dtype(config.dtype)
    attention = attend.chosen(config.attention, device.platform, dtype, architecture.head_dim, config.data.max_length)
    if device in jax.devices():
        attention = attend.tried(attention, config.attention, dtype, architecture)
    model = Decoder(architecture, lora, dtype, param_dtype, config.remat, attention)
    shapes, axes = decoder.abstract(model)
    return model, mesh_lib.laid_out(mesh, axes, shapes)


def compile_step(step: Step) -> jax.stages.Compiled:
    """May raise jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED where the program does not fit."""
    with jax.set_mesh(step.mesh):
        return compiling.compiled(step.function, step.state, step.frozen, step.batch)


def memory_of(step: Step, compiled: jax.stages.Compiled | None) -> Memory:
    """Of a compiled step; without one, what its arguments alone need."""
    base, adapter = device_bytes(step.frozen), device_bytes(step.state.trainable)
    optimizer = device_bytes(step.state.opt_state)
    if compiled is None:
        return Memory(base, adapter, optimizer, device_bytes(step.batch), 0, 0)
    said = compiled.memory_analysis()
    arguments = said.argument_size_in_bytes - base - adapter - optimizer
    results = said.output_size_in_bytes - said.alias_size_in_bytes  # the state goes where it came from
    program = said.generated_code_size_in_bytes
    return Memory(base, adapter, optimizer, arguments + results, said.temp_size_in_bytes, program)


def device_bytes(tree) -> int:
    """Of a tree of laid-out shapes on one device."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in arrays)
