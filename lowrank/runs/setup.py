"""The training step of a config before there are arrays, compiled also for devices that are not here.

A run, a plan and a benchmark use the same `Step`: model, mask, optimizer, layouts and jitted function, over shapes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lowrank.adapters.config import LoraConfig
from lowrank.config import Config
from lowrank.data.batch import Batch, abstract_batch
from lowrank.families.config import ModelConfig
from lowrank.model import decoder, kernels
from lowrank.model.decoder import Decoder
from lowrank.parallel import compiling
from lowrank.parallel import mesh as mesh_lib
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step; the leaves of its trees are ShapeDtypeStructs with their shardings."""

    mesh: Mesh
    model: Decoder
    shapes: dict  # of all variables
    mask: dict  # which of them are trained
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    state: State
    frozen: dict
    batch: Batch
    function: Callable  # jitted (state, frozen, batch) -> (state, StepMetrics)


def abstract_step(config: Config, architecture: ModelConfig, mesh: Mesh, steps: int) -> Step:
    """The step of a run of so many steps."""
    model, shapes = model_of(config, architecture, config.adapter, mesh)
    mask = partition.trainable_mask(shapes, config.train.mode)
    trainable, frozen = partition.split(shapes, mask)
    schedule = learning_rate_schedule(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule, mask)
    state = abstract_state(optimizer, trainable, mesh)
    function = make_train_step(model, optimizer, schedule, config.train.microbatches, state)
    batch = abstract_batch(config.train.batch_size, config.data.max_length, mesh)
    return Step(mesh, model, shapes, mask, schedule, optimizer, state, frozen, batch, function)


def model_of(config: Config, architecture: ModelConfig, lora: LoraConfig | None, mesh: Mesh) -> tuple[Decoder, dict]:
    """-> (the model with this adapter, the shapes of its variables with their shardings)."""
    # Trained weights are held in float32: in bfloat16 an update below 1/256 of a weight is lost.
    param_dtype = jnp.dtype("float32" if config.train.mode == "full" else config.param_dtype)
    device, dtype = mesh.devices.flat[0], jnp.dtype(config.dtype)
    attention = kernels.choose_backend(
        config.attention, device.platform, dtype, architecture.head_dim, config.data.max_length
    )
    if device in jax.devices():
        attention = kernels.verify_backend(attention, config.attention, dtype, architecture)
    model = Decoder(architecture, lora, dtype, param_dtype, config.remat, attention)
    shapes, axes = decoder.abstract(model)
    return model, mesh_lib.with_shardings(mesh, axes, shapes)


def compile_step(step: Step) -> jax.stages.Compiled:
    """Raises jax.errors.JaxRuntimeError with RESOURCE_EXHAUSTED if the program does not fit."""
    with jax.set_mesh(step.mesh):
        return compiling.compile_for(step.function, step.state, step.frozen, step.batch)
