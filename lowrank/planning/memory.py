"""TODO planning.memory"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank.runs.setup import Step


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
