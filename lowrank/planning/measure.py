"""A plan's step run here, on random weights and random tokens: what the clock says."""

import contextlib
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.model import decoder
from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.planning.chips import Chip
from lowrank.planning.plan import Plan
from lowrank.planning.topology import Slice
from lowrank.runs.speed import best_seconds, product_flops
from lowrank.training import partition
from lowrank.training.step import init_state

STEPS = 3


def measured_seconds(plan: Plan) -> float:
    """Of the fastest of STEPS steps."""
    step = plan.step
    layout = jax.tree.map(lambda leaf: leaf.sharding, step.shapes)
    variables = jax.jit(lambda key: decoder.init(step.model, key), out_shardings=layout)(jax.random.key(0))
    trainable, frozen = partition.split(variables, step.mask)
    state = init_state(step.optimizer, trainable, jax.random.key(0), step.state)
    del variables, trainable  # the step donates them
    batch = random_batch(plan)
    best = float("inf")
    for _ in range(STEPS):
        began = time.perf_counter()
        state, metrics = plan.program(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        best = min(best, time.perf_counter() - began)
    return best


def random_batch(plan: Plan) -> dict:
    """Rows of one example each, all of them trained on: what the estimate counts."""
    rows, length = plan.step.batch["inputs"].shape
    tokens = np.random.default_rng(0).integers(0, plan.architecture.vocab, (rows, length + 1), np.int32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_mask": np.ones((rows, length), bool),
    }
    return {name: jax.device_put(jnp.asarray(x), plan.step.batch[name].sharding) for name, x in arrays.items()}


COPIED = 2**26  # float32 numbers


class Local(Slice):
    """Its links are taken to be as fast as its memory, which is what several CPU devices share."""

    @property
    def name(self) -> str:
        return self.chip.name

    @property
    def bandwidth(self) -> float:
        return self.chip.link

    def compiling(self) -> typing.ContextManager:
        return contextlib.nullcontext()

    def group_bandwidth(self, devices: typing.Sequence[jax.Device]) -> float:
        return self.chip.link


def open_local(dtype: jnp.dtype) -> Local:
    """All local devices."""
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
    devices = list(mesh.devices.flat)
    long = jax.device_put(jnp.ones(COPIED, jnp.float32), devices[0])
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * long.nbytes / best_seconds(copy, long)
    free = memory.free_bytes(mesh)
    chip = Chip("local", product_flops(devices[0], dtype), free, bandwidth, bandwidth, (str(len(devices)),))
    return Local(chip, str(len(devices)), devices)
