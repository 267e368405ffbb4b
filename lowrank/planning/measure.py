"""A plan's step timed on this machine, with random weights and random tokens."""

import time

import jax
import numpy as np

from lowrank.data.batch import Batch, to_devices
from lowrank.errors import UserError
from lowrank.planning.plan import Plan
from lowrank.runs.inputs import initial_variables
from lowrank.training import partition
from lowrank.training.step import init_state

STEPS = 3


def measure_seconds(plan: Plan) -> float:
    """Seconds of the fastest of STEPS steps. `plan` is one for this machine (topology "local"), and fits."""
    step, program = plan.step, plan.program
    if program is None or plan.slice.name != "local":
        raise UserError(f"a plan for {plan.slice.name} cannot run here; measure one that fits, with topology local")
    variables = initial_variables(plan.config, step.model, None, step.shapes, set(step.shapes))
    trainable, frozen = partition.split(variables, step.mask)
    state = init_state(step.optimizer, trainable, jax.random.key(0), step.state)
    del variables, trainable  # the step donates them
    # Rows of one example each, trained on every token, which is what the estimate assumes.
    rows, length = plan.config.train.batch_size, plan.config.data.max_length
    tokens = np.random.default_rng(0).integers(0, plan.architecture.vocab, (rows, length + 1), np.int32)
    positions, segment_ids = np.tile(np.arange(length, dtype=np.int32), (rows, 1)), np.ones((rows, length), np.int32)
    random = Batch(tokens[:, :-1], tokens[:, 1:], positions, segment_ids, segment_ids.astype(bool))
    batch = to_devices(random, step.mesh)
    best = float("inf")
    for _ in range(STEPS):
        began = time.perf_counter()
        state, metrics = program(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        best = min(best, time.perf_counter() - began)
    return best
