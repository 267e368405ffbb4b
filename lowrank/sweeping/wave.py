"""One wave of a sweep's group: members that train together, from their beginning or last checkpoint to their end.

The members are stacked into one state with one batch stream. While they train there is one checkpoint for all of them, in the
wave's own folder; at the end every member is written out as an ordinary workdir with its last checkpoint and its best one.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.errors import UserError
from lowrank.files.lines import forget_after
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.inputs import evaluation_batches, identity, training_batches
from lowrank.runs.loop import due, run_steps
from lowrank.runs.metrics import Metrics, best_evaluation, evaluation_scalars, evaluation_sums, read_evaluations
from lowrank.runs.profiling import Profile
from lowrank.runs.samples import write_answers, write_samples
from lowrank.runs.speed import make_speed
from lowrank.runs.train import NOT_WRITTEN, training_scalars
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member
from lowrank.sweeping.group import Group, Programs, initial_state, member_keys, pad_members, shardings_of
from lowrank.sweeping.progress import Progress
from lowrank.sweeping.ranking import Result
from lowrank.sweeping.workdirs import MemberCheckpoint, member_result, write_member
from lowrank.training import partition
from lowrank.training.step import State


class Stopped(Exception):
    """The signal of this name asked to stop; everything is saved."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """How the sweep was called, for the members' `config.json`."""

    overrides: Sequence[str]
    command: str


def train_wave(
    group: Group,
    programs: Programs,
    wave: tuple[Member, ...],
    frozen: dict,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    origin: Origin,
    stop: Callable[[int], str | None],
    profile: Profile,
) -> list[Result]:
    """Train the members of one wave to their end; `folder` holds its checkpoints until then. Raises Stopped."""
    config, inputs, mesh, steps = group.config, group.inputs, group.mesh, group.inputs.steps
    names = [member.name for member in wave]
    places = {name: workdir / "members" / name for name in names}
    diverged: dict[
        str, dict
    ] = {}  # frozen members: the step that was not finite, the data's position and tokens before it
    best: dict[str, tuple[float, int]] = {}  # each member's best evaluation: (loss, step)
    with contextlib.ExitStack() as stack:
        stack.callback(profile.close)
        for member in wave:
            own_identity = identity(member.config, inputs)
            opened = workdir_lib.open_workdir(
                places[member.name], member.config, own_identity, origin.overrides, origin.command
            )
            stack.enter_context(opened)
        in_use = lambda: {step for _, step in best.values()}  # noqa: E731
        checkpoints = stack.enter_context(Checkpoints(folder, keep=2, also_keep=in_use))

        # ---- State: from the wave's last checkpoint, else from the beginning.
        batches = training_batches(config, inputs.train)
        first, tokens = checkpoints.latest() or 0, 0
        if first:
            meta = checkpoints.meta(first)
            if meta["members"] != names:
                raise UserError(f"{folder} holds a checkpoint of other members; remove it to train this group anew")
            tokens, diverged = meta["tokens"], meta["diverged"]
            state, position = restore_wave(checkpoints, first, group, programs, wave)
            at = [-1 if name in diverged else first for name in names] + [-1] * (group.count - len(wave))
            state = state._replace(step=jax.device_put(np.int32(at), state.step.sharding))
            batches.set_state(position)
        else:
            state = initial_state(group, programs, wave)
        own_hyperparams = members_lib.hyperparams_of([m.config for m in wave], steps, inputs.architecture.layers)
        by_member = NamedSharding(mesh, PartitionSpec("member"))
        hyperparams = jax.device_put(pad_members(own_hyperparams, group.count), by_member)
        writers = {}
        for member in wave:
            for file in ("metrics.jsonl", "samples.jsonl"):
                forget_after(places[member.name] / file, first or -1)
            best[member.name] = best_evaluation(places[member.name])
            writers[member.name] = Metrics(places[member.name], member.config, first)
            stack.callback(writers[member.name].close)
        progress = stack.enter_context(Progress(names, steps, first))
        for name, found in diverged.items():
            progress.record_divergence(name, found["step"])
        if left_out := profile.skip_until(first):
            progress.say(left_out)
        eval_batches = evaluation_batches(config, inputs.held_out)
        speed = make_speed(mesh, group.model.dtype, config, [(inputs.architecture, m.config.adapter) for m in wave])

        def freeze(name: str, step: int, position: dict, seen: int, why: str):
            diverged[name] = {"step": step, "data": position, "tokens": seen}
            progress.record_divergence(name, step)
            progress.say(f"step {step}/{steps}  {name}: {why}; it is frozen at step {step - 1}, the others go on")

        def going_on() -> list[tuple[int, str]]:
            return [(i, name) for i, name in enumerate(names) if name not in diverged]

        def variables_of(trainables: dict, i: int) -> dict:
            """A member's variables for `group.model`, whose scale is 1: the member's own scale goes into lora_b.

            From leaves on the host: slicing one member out of an array that is spread over devices moves it through all of them.
            """
            trainable = jax.tree.map(lambda leaf: leaf[i], trainables)
            scales = {target: scalars.scale[i] for target, scalars in (own_hyperparams.adapters or {}).items()}
            return partition.merge(members_lib.scaled(trainable, scales), frozen)

        def evaluate(step: int, state: State) -> tuple[State, bool]:
            """Evaluate every member -> (the state, where a loss that is not finite freezes its member; whether one improved)."""
            total, count = evaluation_sums(programs.eval_step, eval_batches, mesh, state.trainable, hyperparams, frozen)
            trainables = jax.device_get(state.trainable) if config.eval.answers else None
            improved = False
            for i, name in going_on():
                loss = float(total[i] / count)
                if not math.isfinite(loss):
                    freeze(name, step + 1, batches.get_state(), tokens, f"the evaluation loss is {loss}")
                    at = np.array(state.step)
                    at[i] = -1  # a member whose step lags behind is not updated
                    state = state._replace(step=jax.device_put(at, programs.layout.step.sharding))
                    continue
                scalars = evaluation_scalars(loss)
                if trainables is not None:
                    file, variables = places[name] / "samples.jsonl", variables_of(trainables, i)
                    scalars["eval/exact_match"] = write_answers(file, step, group.model, variables, inputs, config)
                writers[name].write(step, scalars)
                progress.record_loss(name, loss)
                if loss < best[name][0]:
                    best[name], improved = (loss, step), True
            progress.show_evaluation(step)
            return state, improved

        def sample(step: int, state: State):
            trainables = jax.device_get(state.trainable)
            for i, name in going_on():
                file, variables = places[name] / "samples.jsonl", variables_of(trainables, i)
                write_samples(file, step, group.model, variables, inputs, config)

        # ---- The loop: log, evaluate, sample, save, as a run alone does.
        step = first
        for tick in run_steps(
            lambda state, batch, step: programs.step(state, hyperparams, frozen, batch, np.int32(step - 1)),
            state, batches, mesh, config, first, steps, stop, speed, profile,
        ):  # fmt: skip
            step = tick.step
            if 0 < step == profile.stop:
                progress.say(profile.describe())
            for result in tick.results:
                finite = np.isfinite(result.metrics.loss) & np.isfinite(result.metrics.grad_norm)
                for i, name in going_on():
                    if not finite[i]:
                        loss, grad_norm = result.metrics.loss[i], result.metrics.grad_norm[i]
                        why = f"the loss is {loss} and the gradient's norm {grad_norm}"
                        freeze(name, result.step, result.position, tokens, why)
                tokens += int(result.metrics.tokens[0])
                rates = None
                if (config.log.every and result.step == 1) or due(result.step, config.log.every, steps):
                    rates = speed.rates()
                    logged = {key: rate for key, rate in rates.items() if key not in NOT_WRITTEN}
                    for i, name in going_on():
                        line = training_scalars(result, tokens, i) | logged
                        writers[name].write(result.step, line)
                        progress.record_train_loss(name, line["train/loss"])
                progress.show_step(result.step, rates)
            if tick.pauses:
                with speed.paused():
                    improved = False
                    if tick.evaluates and eval_batches:
                        tick.state, improved = evaluate(step, tick.state)
                    if tick.samples:
                        sample(step, tick.state)
                    if tick.saves or (improved and step > 0) or tick.stopped_by:
                        meta = {"step": step, "tokens": tokens, "diverged": diverged, "members": names}
                        meta |= {"versions": workdir_lib.versions()}
                        checkpoints.save(step, _members_only(tick.state, len(wave)), batches.get_state(), meta)
            state = tick.state
            if tick.stopped_by and step < steps:
                checkpoints.wait()
                progress.say(f"stopped by {tick.stopped_by} after step {step}, which is saved")
                raise Stopped(tick.stopped_by)
            if len(diverged) == len(wave):
                break
        checkpoints.wait()

        # ---- Every member becomes an ordinary workdir.
        last_state, results = jax.device_get(state._replace(key=None)), []
        earlier = _best_checkpoints(checkpoints, group, programs, wave, best, steps)
        for i, member in enumerate(wave):
            name, divergence = member.name, diverged.get(member.name)
            evaluations = read_evaluations(places[name])
            last, seen, position = steps, tokens, batches.get_state()
            if divergence:
                last, seen, position = divergence["step"] - 1, divergence["tokens"], divergence["data"]
            own = jax.tree.map(lambda leaf, i=i: leaf[i], last_state)
            written = [MemberCheckpoint(last, own, seen, position, evaluations.get(last))]
            if name in earlier and earlier[name].step < last:
                written.insert(0, earlier[name])
            trainable = write_member(group, member, places[name], written)
            results.append(
                member_result(group, member, places[name], trainable, last, divergence["step"] if divergence else None)
            )
        return results


def _best_checkpoints(
    checkpoints: Checkpoints,
    group: Group,
    programs: Programs,
    wave: tuple[Member, ...],
    best: dict[str, tuple[float, int]],
    steps: int,
) -> dict[str, MemberCheckpoint]:
    """Each member's checkpoint of its best evaluation, if that came before the last step; one wave is on the host at a time."""
    found = {}
    for step in sorted({step for _, step in best.values()} & set(checkpoints.steps()) - {steps}):
        state, position = restore_wave(checkpoints, step, group, programs, wave)
        host, seen = jax.device_get((state.trainable, state.opt_state)), checkpoints.meta(step)["tokens"]
        for i, member in enumerate(wave):
            loss, best_step = best[member.name]
            if best_step == step:
                trainable, opt_state = jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), host)
                own = State(np.int32(step), trainable, opt_state, None)
                found[member.name] = MemberCheckpoint(step, own, seen, position, loss)
    return found


def restore_wave(
    checkpoints: Checkpoints, step: int, group: Group, programs: Programs, wave: tuple[Member, ...]
) -> tuple[State, dict]:
    """-> the wave's state at `step`, whose `step` is still a shape; the data's position."""
    saved = programs.layout
    if group.count != len(wave):  # padding is not saved
        whole = NamedSharding(group.mesh, PartitionSpec())
        saved = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(wave), *leaf.shape[1:]), leaf.dtype, sharding=whole), saved
        )
    state, position = checkpoints.restore(step, saved)
    filled = pad_members((state.trainable, state.opt_state), group.count)
    layout = programs.layout
    trainable, opt_state = jax.device_put(filled, shardings_of((layout.trainable, layout.opt_state)))
    return State(layout.step, trainable, opt_state, member_keys(group, programs, wave)), position


def _members_only(state: State, count: int) -> State:
    """The state without its padding."""
    if count == len(state.step):
        return state
    return jax.tree.map(lambda leaf: leaf[:count], jax.device_get(state._replace(key=None)))
