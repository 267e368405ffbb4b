"""One part of a sweep's group, trained from its beginning or its last checkpoint to its end.

The members are stacked into one state with one batch stream. While they train there is one checkpoint for all of them, in the
part's own folder; at the end every member is written out as an ordinary workdir, with what the same run alone would have
saved last.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank import config as config_lib
from lowrank.adapters.lora import padding_size
from lowrank.errors import UserError
from lowrank.files import lines as lines_lib
from lowrank.inference import answers as answers_lib
from lowrank.inference import text as text_lib
from lowrank.runs import metrics
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.inputs import evaluation_batches, identity, on_devices, training_batches
from lowrank.runs.metrics import due
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member
from lowrank.sweeping.group import Group, Programs, filled_up, initial_state, keys_of, own_model, shardings_of
from lowrank.sweeping.progress import Progress
from lowrank.sweeping.ranking import Result
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, abstract_state


class Stopped(Exception):
    """A signal asked to stop; all is saved."""


def train_part(
    group: Group,
    programs: Programs,
    part: tuple[Member, ...],
    frozen: dict,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    arguments: list[str],
    stop: Callable[[], str | None],
) -> list[Result]:
    """Train the members of one part to their end; `folder` holds its checkpoints until then. Raises Stopped."""
    config, prepared, mesh, steps = group.config, group.prepared, group.mesh, group.prepared.steps
    names = [member.name for member in part]
    with contextlib.ExitStack() as stack:
        for member in part:
            place = workdir / "members" / member.name
            own_identity = identity(member.config, prepared)
            stack.enter_context(workdir_lib.open_workdir(place, member.config, own_identity, arguments, "sweep"))
        checkpoints = stack.enter_context(Checkpoints(folder, keep=2))

        # ---- State: from the part's last checkpoint, else from the beginning.
        batches = training_batches(config, prepared.train)
        first = checkpoints.latest() or 0
        tokens, diverged = 0, {}  # of members that were frozen: the step that was not finite, and where the data was
        if first:
            meta = checkpoints.meta(first)
            if meta["members"] != names:
                raise UserError(f"{folder} holds a checkpoint of other members; remove it to train this group anew")
            tokens, diverged = meta["tokens"], meta["diverged"]
            state, position = restored(checkpoints, first, group, programs, part)
            at = [-1 if name in diverged else first for name in names] + [-1] * (group.count - len(part))
            state = state._replace(step=jax.device_put(np.int32(at), state.step.sharding))
            batches.set_state(position)
        else:
            state = initial_state(group, programs, part)
        own_numbers = members_lib.numbers_of([m.config for m in part], steps, prepared.architecture.layers)
        by_member = NamedSharding(mesh, PartitionSpec("member"))
        numbers = jax.device_put(filled_up(own_numbers, group.count), by_member)

        writers = {}
        for member in part:
            place = workdir / "members" / member.name
            for file in ("metrics.jsonl", "samples.jsonl"):
                lines_lib.forget_after(place / file, first if first else -1)
            log = config.log
            writers[member.name] = metrics.Metrics(
                place, config_lib.to_dict(member.config), log.tensorboard, None, first
            )
            stack.callback(writers[member.name].close)
        board = stack.enter_context(Progress(names, steps, first))
        for name, found in diverged.items():
            board.diverged(name, found["step"])
        eval_batches = evaluation_batches(config, prepared.held_out)
        eval_rows = config.train.batch_size // config.train.microbatches

        # ---- Evaluation and samples, of every member that goes on.
        def freeze(name: str, step: int, data: dict, seen: int, why: str):
            diverged[name] = {"step": step, "data": data, "tokens": seen}
            board.diverged(name, step)
            board.say(f"step {step}/{steps}  {name}: {why}; it is frozen at step {step - 1}, the others go on")

        def evaluate(step: int):
            nonlocal state
            losses, count = np.zeros(group.count), 0
            trainables = jax.device_get(state.trainable) if config.eval.answers else None
            for batch in eval_batches:
                with jax.set_mesh(mesh):
                    summed, trained = programs.eval_step(state.trainable, numbers, frozen, on_devices(batch, mesh))
                losses, count = losses + np.asarray(summed, np.float64), count + int(trained)
            for i, name in enumerate(names):
                loss = float(losses[i] / count)
                if name in diverged:
                    continue
                if not math.isfinite(loss):
                    freeze(name, step + 1, batches.get_state(), tokens, f"the evaluation loss is {loss}")
                    at = np.array(state.step)
                    at[i] = -1  # behind for ever
                    state = state._replace(step=jax.device_put(at, programs.layout.step.sharding))
                    continue
                scalars = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}
                if config.eval.answers:
                    scalars["eval/exact_match"] = answer(step, alone(trainables, i), name)
                writers[name].write(step, scalars)
                board.evaluated(name, loss)
            board.show_evaluation(step)

        def answer(step: int, variables: dict, name: str) -> float:
            asked = prepared.held_out.examples[: config.eval.answers]
            given = answers_lib.answers(group.model, variables, prepared.tokenizer, asked, eval_rows)
            for prompt, text, reference in given[:10]:
                record = {"step": step, "prompt": prompt, "text": text, "reference": reference}
                lines_lib.append_line(workdir / "members" / name / "samples.jsonl", record)
            return sum(text == reference for _, text, reference in given) / len(given)

        def sample(step: int):
            asked, tokenizer, trainables = config.sample.prompts, prepared.tokenizer, jax.device_get(state.trainable)
            rows = [text_lib.encode_prompt(prompt, "", config.data.format, tokenizer) for prompt in asked]
            for i, name in enumerate(names):
                if name in diverged:
                    continue
                variables = alone(trainables, i)
                texts = text_lib.complete(group.model, variables, tokenizer, rows, config.sample.max_new_tokens)
                for prompt, text in zip(asked, texts, strict=True):
                    record = {"step": step, "prompt": prompt, "text": text}
                    lines_lib.append_line(workdir / "members" / name / "samples.jsonl", record)

        def alone(trainables: dict, i: int) -> dict:
            """A member's variables for `group.model`, whose scale is 1: the member's own scale goes into lora_b.

            Of leaves on the host: taking one member out of an array that lies over devices would move it through all of them.
            """
            trainable = jax.tree.map(lambda leaf: leaf[i], trainables)
            scales = {target: own.scale[i] for target, own in (own_numbers.adapters or {}).items()}
            return partition.merge(members_lib.scaled(trainable, scales), frozen)

        # ---- The loop: step, read the step before, evaluate, sample, save, as in train.
        pending = None
        places = {first: batches.get_state()}  # where the data was after each of the last steps
        clock, clock_tokens = time.monotonic(), tokens

        def read_pending():
            nonlocal pending, tokens, clock, clock_tokens
            if pending is None:
                return
            step, scalars = pending
            pending = None
            scalars = jax.device_get(scalars)
            finite = np.isfinite(scalars["loss"]) & np.isfinite(scalars["grad_norm"])
            before = tokens
            tokens += int(scalars["tokens"][0])
            for i, name in enumerate(names):
                if name not in diverged and not finite[i]:
                    why = f"the loss is {scalars['loss'][i]} and the gradient's norm {scalars['grad_norm'][i]}"
                    freeze(name, step, places[step - 1], before, why)
            logs = (config.log.every and step == 1) or due(step, config.log.every, steps)
            if logs:
                now = time.monotonic()
                rate = (tokens - clock_tokens) / max(now - clock, 1e-9)
                for i, name in enumerate(names):
                    if name not in diverged:
                        line = {
                            f"train/{key}": float(scalars[key][i]) for key in ("loss", "grad_norm", "learning_rate")
                        }
                        line |= {"train/tokens": tokens, "train/tokens_per_second": rate}
                        writers[name].write(step, line)
                        board.trained(name, line["train/loss"])
                clock, clock_tokens = now, tokens
            board.step(step, logs)

        if first == 0:
            if eval_batches and config.eval.every:
                evaluate(0)
            if config.sample.every:
                sample(0)
        clock = time.monotonic()
        for step in range(first + 1, steps + 1):
            batch = next(batches)
            with jax.set_mesh(mesh):
                state, scalars = programs.step(state, numbers, frozen, on_devices(batch, mesh), np.int32(step - 1))
            read_pending()
            pending = (step, scalars)
            places = {step - 1: places[step - 1], step: batches.get_state()}

            evaluates = bool(eval_batches) and due(step, config.eval.every, steps)
            samples = due(step, config.sample.every, steps)
            saves = step == steps or due(step, config.checkpoint.every, steps)
            if evaluates or samples or saves or stop():
                read_pending()
                paused = time.monotonic()
                if evaluates:
                    evaluate(step)
                if samples:
                    sample(step)
                stopped_by = stop()
                if saves or stopped_by:
                    meta = {"step": step, "tokens": tokens, "diverged": diverged, "members": names}
                    meta |= {"versions": workdir_lib.versions()}
                    checkpoints.save(step, _members_only(state, len(part)), batches.get_state(), meta)
                clock += time.monotonic() - paused
                if stopped_by and step < steps:
                    checkpoints.wait()
                    board.say(f"stopped by {stopped_by} after step {step}, which is saved")
                    raise Stopped
            if len(diverged) == len(part):
                break
        checkpoints.wait()

        # ---- Every member becomes an ordinary workdir.
        results, state = [], jax.device_get(state._replace(key=None))
        for i, member in enumerate(part):
            found = diverged.get(member.name)
            own = {"step": steps, "tokens": tokens, "data": batches.get_state()}
            if found:
                own = {"step": found["step"] - 1, "tokens": found["tokens"], "data": found["data"]}
            place = workdir / "members" / member.name
            evaluated = [line for line in lines_lib.read_lines(place / "metrics.jsonl") if "eval/loss" in line]
            at_end = [line["eval/loss"] for line in evaluated if line["step"] == own["step"]]
            own["eval_loss"] = at_end[-1] if at_end else None
            own_state = write_member(group, member, place, jax.tree.map(lambda leaf, i=i: leaf[i], state), own)
            results.append(result_of(group, member, place, own_state, own["step"], found and found["step"]))
        return results


def restored(checkpoints: Checkpoints, step: int, group: Group, programs: Programs, part) -> tuple[State, dict]:
    """The part's state at `step` (its own steps still to be set), and the data's position."""
    saved = programs.layout
    if group.count != len(part):  # what fills it up is not saved
        whole = NamedSharding(group.mesh, PartitionSpec())
        saved = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(part), *leaf.shape[1:]), leaf.dtype, sharding=whole), saved
        )
    state, position = checkpoints.restore(step, saved)
    filled = filled_up((state.trainable, state.opt_state), group.count)
    layout = programs.layout
    trainable, opt_state = jax.device_put(filled, shardings_of((layout.trainable, layout.opt_state)))
    return State(layout.step, trainable, opt_state, keys_of(group, programs, part)), position


def _members_only(state: State, count: int) -> State:
    """Without what fills the state up."""
    if count == len(state.step):
        return state
    return jax.tree.map(lambda leaf: leaf[:count], jax.device_get(state._replace(key=None)))


def write_member(group: Group, member: Member, place: pathlib.Path, state: State, at: dict) -> dict:
    """Write the member's own checkpoint, as the same run alone would have; -> what it trained, without padding."""
    _, shapes = own_model(group, member)
    trainable, _ = partition.split(shapes, group.mask)
    config = member.config
    optimizer = make_optimizer(config.optim, learning_rate_schedule(config.optim, group.prepared.steps), group.mask)
    wanted = abstract_state(optimizer, trainable, group.mesh)
    own = State(*members_lib.cut(state[:3], wanted[:3]), key=None)
    if at["step"] > 0:
        meta = {"step": at["step"], "tokens": at["tokens"], "config": config_lib.to_dict(config)}
        meta |= {"identity": identity(config, group.prepared), "versions": workdir_lib.versions()}
        with Checkpoints(place) as checkpoints:
            checkpoints.forget()  # of a sweep that was killed amid this, or of a group that is trained again
            checkpoints.save(at["step"], own, at["data"], meta, at["eval_loss"])
    return own.trainable


def adapter_is_whole(group: Group, member: Member, place: pathlib.Path, step: int) -> bool:
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


def result_of(group: Group, member: Member, place: pathlib.Path, trainable: dict, step: int, diverged: int | None):
    lines = lines_lib.read_lines(place / "metrics.jsonl")
    of = {name: [(line["step"], line[name]) for line in lines if name in line] for name in RECORDED}
    config = member.config
    zeros = padding_size(config.lora, group.prepared.architecture) if config.adapter else 0
    parameters = partition.count(trainable) - zeros
    return Result(
        name=member.name,
        swept=member.swept,
        mode=config.train.mode,
        trainable=parameters,
        adapter_bytes=4 * parameters,
        steps=step,
        train_loss=of["train/loss"][-1][1] if of["train/loss"] else None,
        curve=tuple(of["eval/loss"]),
        diverged=diverged,
        exact_match=of["eval/exact_match"][-1][1] if of["eval/exact_match"] else None,
    )


RECORDED = ("train/loss", "eval/loss", "eval/exact_match")
