"""The bytes that a training step takes of one device, by what they hold."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.runs.setup import Step


class Memory(NamedTuple):
    """Bytes on one device while a step runs, as the compiler lays them out."""

    base: int
    adapter: int  # with train.mode "full": the model, which is trained
    optimizer: int
    other: int  # the batch, the PRNG key, and the padding of all arrays to tiles
    temporaries: int  # activations, gathered kernels, gradients
    program: int

    @property
    def total(self) -> int:
        return sum(self)


def step_memory(step: Step, program: jax.stages.Compiled | None = None) -> Memory:
    """The memory of a compiled step; without a program, of its arguments alone, unpadded."""
    trees = (step.frozen, step.state.trainable, step.state.opt_state, step.batch)
    base, adapter, optimizer, batch = map(device_bytes, trees)
    if program is None:
        return Memory(base, adapter, optimizer, batch, 0, 0)
    sizes = program.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # the new state takes the donated one's place
    other = sizes.argument_size_in_bytes - base - adapter - optimizer + results
    return Memory(base, adapter, optimizer, other, sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings; PRNG keys are left out."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
