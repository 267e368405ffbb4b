"""The training loop of a run and of a sweep's wave: a generator of steps, one `Tick` after each.

The scalars of a step are read one step late, while the next one computes, so reading them never delays a dispatch. Where
something is due (an evaluation, samples, a save, a stop), the scalars of the same step are read first: a checkpoint is
written only after the loss of its step has been seen.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank.config import Config
from lowrank.data.batch import Batch, to_devices
from lowrank.data.loader import TrainLoader
from lowrank.runs.profiling import Profile
from lowrank.runs.speed import Speed
from lowrank.training.step import State, StepMetrics


class StepResult(NamedTuple):
    step: int  # that is finished
    metrics: StepMetrics  # on the host
    examples: np.ndarray  # int32 [B, T], the indices of the step's examples; -1 for padding
    position: dict  # of the data before the step


@dataclasses.dataclass
class Tick:
    """After step `step`. The caller may replace `state`; the next step donates it."""

    step: int
    state: State
    results: Iterator[StepResult]  # steps since the last tick, oldest first; each is waited for when it is taken
    evaluates: bool
    samples: bool
    saves: bool
    stopped_by: str | None

    @property
    def pauses(self) -> bool:
        """Whether something is due beside the log."""
        return bool(self.evaluates or self.samples or self.saves or self.stopped_by)


def due(step: int, every: int, last: int) -> bool:
    """At every multiple of `every` and at the last step; 0 is off."""
    return every > 0 and (step == last or step % every == 0)


def run_steps(
    update: Callable[[State, Batch, int], tuple[State, StepMetrics]],
    state: State,
    batches: TrainLoader,
    mesh: Mesh,
    config: Config,
    first: int,
    steps: int,
    stop: Callable[[int], str | None],
    speed: Speed,
    profile: Profile,
) -> Iterator[Tick]:
    """Run steps `first` + 1 to `steps`; a run from the beginning starts with a tick of step 0. Ends after a stop.

    `stop` is asked once in each step: several processes then get the same answer at the same step.
    """
    if first == 0:
        tick = Tick(0, state, iter(()), config.eval.every > 0, config.sample.every > 0, False, None)
        yield tick
        state = tick.state
    waiting: list[StepResult] = []  # steps whose scalars are still on the device
    speed.start()
    for step in range(first + 1, steps + 1):
        position = batches.get_state()
        batch, examples = next(batches)
        arrays = to_devices(batch, mesh)
        speed.dispatches(idle=all(result.metrics.loss.is_ready() for result in waiting))
        with speed.paused():
            profile.begin(step)
        with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = update(state, arrays, step)
        if step == profile.stop:
            jax.block_until_ready(metrics)
            with speed.paused():
                profile.close()
        # The step before is waited for first: a signal that comes meanwhile then stops the run at this step.
        jax.block_until_ready([result.metrics for result in waiting])
        waiting.append(StepResult(step, metrics, examples, position))
        every = config.eval.every, config.sample.every, config.checkpoint.every
        evaluates, samples, saves = (due(step, each, steps) for each in every)
        tick = Tick(step, state, iter(()), evaluates, samples, saves or step == steps, stop(step))
        count = len(waiting) if tick.pauses else len(waiting) - 1
        tick.results, waiting = (_read(result, speed) for result in waiting[:count]), waiting[count:]
        yield tick
        state = tick.state
        if tick.stopped_by:
            return


def _read(result: StepResult, speed: Speed) -> StepResult:
    """Wait for a step's scalars. In a wave each has a leading axis of members, all of which see the same tokens."""
    result = result._replace(metrics=jax.device_get(result.metrics))
    speed.read(int(np.ravel(result.metrics.tokens)[0]), int(np.ravel(result.metrics.trained_tokens)[0]))
    return result
