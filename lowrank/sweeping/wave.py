"""One wave of a sweep's group: members that train together, from their beginning or last checkpoint to their end.

The members are stacked into one state with one batch stream. While they train there is one checkpoint for all of them, in the
wave's own folder; at the end every member is written out as an ordinary workdir with its last checkpoint and its best one.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank import config as config_lib
from lowrank.adapters.lora import padding_size
from lowrank.errors import UserError
from lowrank.files.lines import forget_after, read_lines
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.inputs import evaluation_batches, identity, training_batches
from lowrank.runs.loop import StepResult, Tick, due, run_steps
from lowrank.runs.metrics import Metrics, best_evaluation, evaluation_scalars, evaluation_sums, read_evaluations
from lowrank.runs.profiling import Profile
from lowrank.runs.samples import write_answers, write_samples
from lowrank.runs.speed import make_speed
from lowrank.runs.train import NOT_WRITTEN, training_scalars
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member
from lowrank.sweeping.group import Group, Programs, initial_state, member_keys, own_model, pad_members, shardings_of
from lowrank.sweeping.progress import Progress
from lowrank.sweeping.ranking import Result
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, abstract_state


class MemberCheckpoint(NamedTuple):
    """What a checkpoint of one member holds; the trees on the host, padded as in the wave."""

    step: int
    trainable: dict
    opt_state: Any
    tokens: int
    position: dict  # of the data
    eval_loss: float | None


@dataclasses.dataclass
class Wave:
    """The members of a wave, and what it holds while it trains: the stacked state, what became of each member, its files."""

    group: Group
    programs: Programs
    members: tuple[Member, ...]
    frozen: dict
    workdir: pathlib.Path  # of the sweep
    folder: pathlib.Path  # of the wave's checkpoints
    origin: tuple[Sequence[str], str]  # the sweep's overrides and command, for the members' `config.json`

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Open the members' workdirs until `stack` is left; the state is that of the last checkpoint, else the initial one."""
        group, members, inputs, steps = self.group, self.members, self.group.inputs, self.group.inputs.steps
        self.places = {member.name: self.workdir / "members" / member.name for member in members}
        # Members that are frozen: the step that was not finite, the data's position and the tokens before it.
        self.diverged: dict[str, dict] = {}
        best: dict[str, tuple[float, int]] = {}  # each member's best evaluation: (loss, step)
        self.best = best
        for member in members:
            run = self.places[member.name], member.config, identity(member.config, inputs)
            stack.enter_context(workdir_lib.open_workdir(*run, *self.origin))
        # Without a cycle through `self`, which would keep the state on the devices when the wave is done.
        best_steps = lambda: {step for _, step in best.values()}  # noqa: E731
        self.checkpoints = stack.enter_context(Checkpoints(self.folder, keep=2, also_keep=best_steps))
        self.batches = training_batches(group.config, inputs.train)
        self.first, self.tokens = self.checkpoints.latest() or 0, 0
        if self.first:
            meta = self.checkpoints.meta(self.first)
            if meta["members"] != list(self.places):
                raise UserError(
                    f"{self.folder} holds a checkpoint of other members; remove it to train this group anew"
                )
            self.tokens, self.diverged = meta["tokens"], meta["diverged"]
            state, position = self._restore(self.first)
            self.state = self._at_step(state, self.first)
            self.batches.set_state(position)
        else:
            self.state = initial_state(group, self.programs, members)
        # The members' hyperparameters on the host; in `hyperparams`, padded and on the devices.
        self.own = members_lib.hyperparams_of([m.config for m in members], steps, inputs.architecture.layers)
        by_member = NamedSharding(group.mesh, PartitionSpec("member"))
        self.hyperparams = jax.device_put(pad_members(self.own, group.count), by_member)
        self.writers = {}
        for member in members:
            place = self.places[member.name]
            for file in ("metrics.jsonl", "samples.jsonl"):
                forget_after(place / file, self.first or -1)
            self.best[member.name] = best_evaluation(place)
            writer = Metrics(place, member.config, self.first)
            self.writers[member.name] = stack.enter_context(contextlib.closing(writer))
        self.progress = Progress(list(self.places), steps, self.first)
        self.progress.stopped = {name: found["step"] for name, found in self.diverged.items()}
        stack.enter_context(self.progress.live)
        self.eval_batches = evaluation_batches(group.config, inputs.held_out)
        adapters = [(inputs.architecture, member.config.adapter) for member in members]
        self.speed = make_speed(group.mesh, group.model.dtype, group.config, adapters)

    def train(self, stop: Callable[[int], str | None], profile: Profile) -> tuple[list[Result], str | None]:
        """Train the members to their end -> (what came of them, None), or (none, the signal that stopped the wave)."""
        group, steps = self.group, self.group.inputs.steps
        with contextlib.ExitStack() as stack:
            stack.callback(profile.close)
            self._begin(stack)
            if left_out := profile.skip_until(self.first):
                self.progress.say(left_out)
            for tick in run_steps(
                lambda state, batch, step: self.programs.step(state, self.hyperparams, self.frozen, batch, np.int32(step - 1)),
                self.state, self.batches, group.mesh, group.config, self.first, steps, stop, self.speed, profile,
            ):  # fmt: skip
                if 0 < tick.step == profile.stop:
                    self.progress.say(profile.describe())
                for result in tick.results:
                    self._log(result)
                if tick.pauses:
                    with self.speed.paused():
                        improved = tick.evaluates and self._evaluate(tick)
                        if tick.samples:
                            self._sample(tick)
                        if tick.saves or (improved and tick.step > 0) or tick.stopped_by:
                            self._save(tick)
                self.state = tick.state
                if tick.stopped_by and tick.step < steps:
                    self.checkpoints.wait()
                    self.progress.say(f"stopped by {tick.stopped_by} after step {tick.step}, which is saved")
                    return [], tick.stopped_by
                if len(self.diverged) == len(self.members):
                    break
            self.checkpoints.wait()
            return self._write_members(), None

    def _going_on(self) -> list[tuple[int, str]]:
        """The members that did not diverge: (index, name)."""
        return [(i, name) for i, name in enumerate(self.places) if name not in self.diverged]

    def _log(self, result: StepResult) -> None:
        """Write a step's scalars where they are due; freeze the members for which they are not finite."""
        config, steps = self.group.config, self.group.inputs.steps
        loss, grad_norm = result.metrics.loss, result.metrics.grad_norm
        for i, name in self._going_on():
            if not np.isfinite(loss[i]) or not np.isfinite(grad_norm[i]):
                why = f"the loss is {loss[i]} and the gradient's norm {grad_norm[i]}"
                self._freeze(name, result.step, result.position, why)
        self.tokens += int(result.metrics.tokens[0])
        rates = None
        if (config.log.every and result.step == 1) or due(result.step, config.log.every, steps):
            rates = self.speed.rates()
            logged = {key: rate for key, rate in rates.items() if key not in NOT_WRITTEN}
            for i, name in self._going_on():
                line = training_scalars(result, self.tokens, i) | logged
                self.writers[name].write(result.step, line)
                self.progress.train_losses[name] = line["train/loss"]
        self.progress.show_step(result.step, rates)

    def _evaluate(self, tick: Tick) -> bool:
        """Evaluate every member -> whether one is better than before. A loss that is not finite freezes its member."""
        if not self.eval_batches:
            return False
        group, step, improved, diverged = self.group, tick.step, False, len(self.diverged)
        total, count = evaluation_sums(
            self.programs.eval_step, self.eval_batches, group.mesh, tick.state.trainable, self.hyperparams, self.frozen
        )
        trainables = jax.device_get(tick.state.trainable) if group.config.eval.answers else None
        for i, name in self._going_on():
            loss = float(total[i] / count)
            if not math.isfinite(loss):
                self._freeze(name, step + 1, self.batches.get_state(), f"the evaluation loss is {loss}")
                continue
            scalars = evaluation_scalars(loss)
            if trainables is not None:
                file, variables = self.places[name] / "samples.jsonl", self._variables_of(trainables, i)
                scalars["eval/exact_match"] = write_answers(
                    file, step, group.model, variables, group.inputs, group.config
                )
            self.writers[name].write(step, scalars)
            self.progress.losses[name] = loss
            if loss < self.best[name][0]:
                self.best[name], improved = (loss, step), True
        if len(self.diverged) > diverged:
            tick.state = self._at_step(tick.state, step)
        self.progress.show_evaluation(step)
        return improved

    def _sample(self, tick: Tick) -> None:
        trainables = jax.device_get(tick.state.trainable)
        for i, name in self._going_on():
            file, variables = self.places[name] / "samples.jsonl", self._variables_of(trainables, i)
            write_samples(file, tick.step, self.group.model, variables, self.group.inputs, self.group.config)

    def _save(self, tick: Tick) -> None:
        """Start saving the members' state, without its padding."""
        state, count = tick.state, len(self.members)
        if count < self.group.count:
            state = jax.tree.map(lambda leaf: leaf[:count], jax.device_get(state._replace(key=None)))
        meta = {"step": tick.step, "tokens": self.tokens, "diverged": self.diverged, "members": list(self.places)}
        meta |= {"versions": workdir_lib.versions()}
        self.checkpoints.save(tick.step, state, self.batches.get_state(), meta)

    def _write_members(self) -> list[Result]:
        """Make every member an ordinary workdir -> what came of each."""
        last_state, results = jax.device_get(self.state[1:3]), []
        best = self._best_checkpoints()
        now = {"step": self.group.inputs.steps + 1, "data": self.batches.get_state(), "tokens": self.tokens}
        for i, member in enumerate(self.members):
            place, name = self.places[member.name], member.name
            end, evaluations = self.diverged.get(name, now), read_evaluations(place)
            last = end["step"] - 1
            own = jax.tree.map(lambda leaf, i=i: leaf[i], last_state)
            written = [MemberCheckpoint(last, own[0], own[1], end["tokens"], end["data"], evaluations.get(last))]
            if name in best and best[name].step < last:
                written.insert(0, best[name])
            diverged = end["step"] if name in self.diverged else None
            results.append(write_member(self.group, member, place, written, diverged))
        return results

    def _best_checkpoints(self) -> dict[str, MemberCheckpoint]:
        """Each member's checkpoint of its best evaluation, if that came before the last step; one is on the host at a time."""
        found = {}
        steps = {step for _, step in self.best.values()} - {self.group.inputs.steps}
        for step in sorted(steps & set(self.checkpoints.steps())):
            state, position = self._restore(step)
            host, tokens = jax.device_get(state[1:3]), self.checkpoints.meta(step)["tokens"]
            for i, name in enumerate(self.places):
                loss, best_step = self.best[name]
                if best_step == step:
                    own = jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), host)
                    found[name] = MemberCheckpoint(step, own[0], own[1], tokens, position, loss)
        return found

    def _restore(self, step: int) -> tuple[State, dict]:
        """-> (the state saved at `step`, whose own `step` is still a shape; the data's position)."""
        group, layout, count = self.group, self.programs.layout, len(self.members)
        saved = layout
        if count < group.count:  # padding is not saved
            whole = NamedSharding(group.mesh, PartitionSpec())
            saved = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=whole), saved
            )
        state, position = self.checkpoints.restore(step, saved)
        filled = pad_members(state[1:3], group.count)
        trainable, opt_state = jax.device_put(filled, shardings_of(layout[1:3]))
        return State(layout.step, trainable, opt_state, member_keys(group, self.programs, self.members)), position

    def _at_step(self, state: State, step: int) -> State:
        """The state after `step`; a member whose own step lags behind, as that of a frozen one, is not updated any more."""
        at = [-1 if name in self.diverged else step for name in self.places]
        at += [-1] * (self.group.count - len(at))
        return state._replace(step=jax.device_put(np.int32(at), self.programs.layout.step.sharding))

    def _freeze(self, name: str, step: int, position: dict, why: str) -> None:
        self.diverged[name] = {"step": step, "data": position, "tokens": self.tokens}
        self.progress.stopped[name] = step
        steps = self.group.inputs.steps
        self.progress.say(f"step {step}/{steps}  {name}: {why}; it is frozen at step {step - 1}, the others go on")

    def _variables_of(self, trainables: dict, i: int) -> dict:
        """A member's variables for `group.model`, whose scale is 1: the member's own scale goes into lora_b.

        From leaves on the host: slicing one member out of an array that is spread over devices moves it through all of them.
        """
        trainable = jax.tree.map(lambda leaf: leaf[i], trainables)
        scales = {target: scalars.scale[i] for target, scalars in (self.own.adapters or {}).items()}
        return partition.merge(members_lib.scaled(trainable, scales), self.frozen)


def write_member(
    group: Group, member: Member, place: pathlib.Path, written: list[MemberCheckpoint], diverged: int | None
) -> Result:
    """Write a member's checkpoints, as the same run alone would have -> what came of it, also from the lines in its workdir.

    `written`: in the order of their steps; nothing is written of step 0. `diverged`: the step that was not finite.
    """
    _, shapes = own_model(group, member)
    config, inputs = member.config, group.inputs
    optimizer = make_optimizer(config.optim, learning_rate_schedule(config.optim, inputs.steps), group.mask)
    wanted = abstract_state(optimizer, partition.split(shapes, group.mask)[0], group.mesh)
    with Checkpoints(place) as checkpoints:
        checkpoints.forget()  # those of a sweep that was killed here, or of a group that is trained again
        for one in written:
            trainable, opt_state = members_lib.cut((one.trainable, one.opt_state), wanted[1:3])
            if one.step > 0:
                meta = {"step": one.step, "tokens": one.tokens, "config": config_lib.to_dict(config)}
                meta |= {"identity": identity(config, inputs), "versions": workdir_lib.versions()}
                state = State(one.step, trainable, opt_state, None)
                checkpoints.save(one.step, state, one.position, meta, one.eval_loss)
    lines = read_lines(place / "metrics.jsonl")
    last = {name: value for line in lines for name, value in line.items()}
    parameters = partition.count(trainable) - (padding_size(config.lora, inputs.architecture) if config.adapter else 0)
    return Result(
        name=member.name,
        swept=member.swept,
        mode=config.train.mode,
        trainable=parameters,
        adapter_bytes=4 * parameters,
        steps=written[-1].step,
        train_loss=last.get("train/loss"),
        curve=tuple(read_evaluations(place).items()),
        diverged=diverged,
        exact_match=last.get("eval/exact_match"),
    )


def is_whole(group: Group, member: Member, place: pathlib.Path, step: int) -> bool:
    """Whether what the member trained can be read, from the checkpoint of `step` or, if it went on alone, its last one."""
    _, shapes = own_model(group, member)
    try:
        with Checkpoints(place, read_only=True) as checkpoints:
            step = max(step, checkpoints.latest() or 0)
            checkpoints.check(step)
            checkpoints.restore_adapter(step, partition.split(shapes, group.mask)[0])
    except UserError:
        return False
    return True
