"""A plan's step run here, on random weights and random tokens: what the clock says."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.model import decoder
from lowrank.planning import Plan
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
