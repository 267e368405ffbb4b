"""A sweep's group: members that share one compiled step, planned, trained together, and written out as workdirs.

A group is trained in one go, or in parts of `sweep.group_size` members that share the compiled programs, one after the
other. Each part has one batch stream, one stacked state, and while it trains one checkpoint under `groups/`; at its end every member
gets a checkpoint of its own, as the same run alone would have written it.
"""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank import adapters, inference
from lowrank import config as config_lib
from lowrank.config import Config
from lowrank.errors import UserError
from lowrank.grid import Member, SweepConfig
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.lora import padding
from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.preparation import (
    Prepared,
    check_mesh,
    evaluation_batches,
    identity,
    initial_variables,
    on_devices,
    prepare,
    training_batches,
)
from lowrank.training import members as members_lib
from lowrank.training import metrics as metrics_lib
from lowrank.training import partition
from lowrank.training import workdir as workdir_lib
from lowrank.training.board import Board
from lowrank.training.checkpoint import Checkpoints
from lowrank.training.metrics import due
from lowrank.training.objective import CHUNK_TOKENS
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.standings import Result
from lowrank.training.step import State, abstract_state, loss_sum
from lowrank.weights.base import load_params


@dataclasses.dataclass(frozen=True)
class Group:
    """What is known of a group before anything is computed."""

    members: tuple[Member, ...]
    prepared: Prepared
    mesh: Mesh
    model: Decoder  # as wide as the widest member
    shapes: dict  # of one member's variables in that model
    mask: dict
    size: int  # members in one compiled step
    at_once: int  # of these, in the model at one time on each device

    @property
    def config(self) -> Config:
        """Of any member, for what all have in common."""
        return self.members[0].config

    @property
    def count(self) -> int:
        """Members in the stacked state: `size`, filled up so that all devices have as many."""
        together = self.mesh.shape["member"] * self.at_once
        return -(-self.size // together) * together

    @property
    def parts(self) -> list[tuple[Member, ...]]:
        return [self.members[i : i + self.size] for i in range(0, len(self.members), self.size)]


# ---- Before anything is computed ---------------------------------------------------------------------------------------


def plan(members: list[Member], sweep: SweepConfig) -> Group:
    """Find what the members name, and choose how many of them train at once."""
    prepared = prepare(members[0].config)
    if members[0].config.init_adapter:
        members = [
            dataclasses.replace(m, config=adapters.with_ranks_of_start(m.config, prepared.base, None)) for m in members
        ]
    config, architecture = members[0].config, prepared.architecture
    mesh = mesh_lib.members_mesh(mesh_lib.make_mesh(config.mesh))
    check_mesh(mesh, config, architecture)
    for member in members:
        adapters.refuse_other_layers(member.config.lora, architecture.layers)
    lora = members_lib.widest([m.config.lora for m in members]) if config.adapted else None
    model, shapes = model_of(config, architecture, lora, mesh)
    mask = partition.trainable_mask(shapes, config.train.mode)
    group = Group(tuple(members), prepared, mesh, model, shapes, mask, len(members), 1)
    size, at_once = chosen_sizes(group, sweep, memory.free_bytes(mesh))
    return dataclasses.replace(group, size=size, at_once=at_once)


def model_of(config: Config, architecture, lora, mesh: Mesh) -> tuple[Decoder, dict]:
    """-> the model with this adapter, and its variables' shapes, laid out."""
    param_dtype = jnp.dtype("float32" if config.train.mode == "full" else config.param_dtype)
    model = Decoder(architecture, lora, jnp.dtype(config.dtype), param_dtype, config.remat)
    shapes, axes = decoder.abstract(model)
    return model, mesh_lib.laid_out(mesh, axes, shapes)


def unusable_ranks(group: Group) -> tuple[list[str], list[str]]:
    """-> members whose rank is above the size of every matrix it adapts; those with a rank above the size of some."""
    sizes = {target: min(shape) for target, shape in group.prepared.architecture.projections().items()}
    above_all, above_some = [], []
    for member in group.members if group.config.adapted else ():
        lora = member.config.lora
        above = [target for target in lora.targets if lora.width(target) > sizes[target]]
        if above:
            text = f"rank {max(map(lora.width, above))} above {', '.join(f'{t} ({sizes[t]})' for t in above)}"
            (above_all if len(above) == len(lora.targets) else above_some).append(text)
    return list(dict.fromkeys(above_all)), list(dict.fromkeys(above_some))


def chosen_sizes(group: Group, sweep: SweepConfig, free: int) -> tuple[int, int]:
    """-> (members in one compiled step, members in the model at one time on each device), for `free` bytes a device.

    On a CPU one at a time is fastest (15M shape, 2 rows of 256, CPU seconds a member: 0.50 for one at a time, 0.66 for
    eight at once, which also need twice the memory of the process); elsewhere as many as fit.
    """
    mesh, count = group.mesh, len(group.members)
    lanes, cuts = mesh.shape["member"], mesh.shape["fsdp"] * mesh.shape["tensor"]
    trainable, frozen = partition.split(group.shapes, group.mask)
    # Weights, gradient, two moments; and all of them twice, where the step hands new ones on before the old ones go.
    state = 8 * partition.nbytes(trainable) // cuts
    left = max(0, free - partition.nbytes(frozen) // cuts)
    size = sweep.group_size or max(lanes, lanes * int(0.5 * left / state))
    size = -(-count // -(-count // min(size, count)))  # parts of about the same size
    each = -(-size // lanes)
    if sweep.at_once:
        return size, min(sweep.at_once, each)
    if mesh.devices.flat[0].platform == "cpu":
        return size, 1
    fit = int(0.6 * max(0, left - each * state) / activation_bytes(group))
    return size, -(-each // -(-each // max(1, min(fit, each))))


def activation_bytes(group: Group) -> int:
    """About what one member's forward and backward pass need on a device, beside weights and state.

    What is kept for the backward pass, a third more for what it works with, and a chunk's logits and their gradient.
    """
    config, shards = group.config, mesh_lib.batch_shards(group.mesh)
    rows = config.train.batch_size // config.train.microbatches
    whole = jax.ShapeDtypeStruct((rows, config.data.max_length), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), whole)
    batch["loss_mask"] = jax.ShapeDtypeStruct(whole.shape, jnp.bool_)
    trainable, frozen = partition.split(group.shapes, group.mask)

    def loss(trainable, frozen):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
        return loss_sum(group.model, trainable, frozen, zeros, shards)

    kept = memory.residual_bytes(lambda trainable: loss(trainable, _zeros(frozen)), trainable)
    kept = max(0, kept - partition.nbytes(frozen))  # weights are kept too, but once for all members
    tokens = min(CHUNK_TOKENS, rows // shards * config.data.max_length)
    return int(4 / 3 * kept / shards) + 2 * tokens * group.prepared.architecture.vocab * 4


def _zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# ---- Programs and states -----------------------------------------------------------------------------------------------


class Programs:
    """A group's compiled steps and the layout of its stacked state: made once, for all of its parts."""

    def __init__(self, group: Group):
        config, mesh = group.config, group.mesh
        trainable, _ = partition.split(group.shapes, group.mask)
        schedule = learning_rate_schedule(config.optim, group.prepared.steps)
        self.optimizer = make_optimizer(config.optim, schedule, group.mask)
        self.layout = members_lib.stacked_shapes(abstract_state(self.optimizer, trainable, mesh), group.count, mesh)
        shards = mesh_lib.batch_shards(mesh)
        self.step = members_lib.make_members_step(group.model, config, group.mask, shards, self.layout, group.at_once)
        self.eval_step = members_lib.make_members_eval_step(group.model, shards, group.at_once)
        self.init = jax.jit(jax.vmap(self.optimizer.init), out_shardings=_shardings(self.layout.opt_state))


def _shardings(shapes):
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def initial_state(group: Group, programs: Programs, part: tuple[Member, ...]) -> State:
    """The members' states before step 1, each what the same run alone begins with."""
    layout = programs.layout
    trainable = jax.device_put(_filled(initial_trainables(group, part), group.count), _shardings(layout.trainable))
    step = jax.device_put(jnp.zeros(group.count, jnp.int32), layout.step.sharding)
    return State(step, trainable, programs.init(trainable), keys_of(group, programs, part))


def initial_trainables(group: Group, part: tuple[Member, ...]):
    """What the members train, stacked [members of the part, …]."""
    config, base = group.config, group.prepared.base
    wide, _ = partition.split(group.shapes, group.mask)
    if config.train.mode == "full" and base:  # all begin with the base
        params = load_params(base, group.shapes["params"])
        return partition.split(
            {"params": jax.tree.map(lambda leaf: jnp.stack([leaf] * len(part)), params)}, group.mask
        )[0]
    collection = "params" if config.train.mode == "full" else "lora"
    begun = []
    for member in part:
        model, shapes = own_model(group, member)
        made = initial_variables(member.config, model, base, shapes, {collection})
        own, _ = partition.split(made, group.mask)
        begun.append(members_lib.padded(jax.device_get(own), wide))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *begun)


def own_model(group: Group, member: Member) -> tuple[Decoder, dict]:
    """The model that the member would have alone, and its variables' shapes."""
    return model_of(member.config, group.prepared.architecture, member.config.adapted, group.mesh)


def keys_of(group: Group, programs: Programs, part: tuple[Member, ...]) -> jax.Array:
    seeds = [member.config.seed for member in part]
    keys = jax.vmap(jax.random.key)(np.uint32(seeds + seeds[:1] * (group.count - len(part))))
    return jax.device_put(keys, programs.layout.key.sharding)


def _filled(tree, count: int):
    """Stacked leaves, filled up with the first member to `count`: what those compute is thrown away."""

    def filled(leaf):
        ghosts = count - len(leaf)
        return jnp.concatenate([leaf, jnp.repeat(leaf[:1], ghosts, axis=0)]) if ghosts else leaf

    return jax.tree.map(filled, tree)


# ---- Training ----------------------------------------------------------------------------------------------------------


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
        numbers = jax.device_put(_filled(own_numbers, group.count), by_member)

        writers = {}
        for member in part:
            place = workdir / "members" / member.name
            for file in ("metrics.jsonl", "samples.jsonl"):
                metrics_lib.forget_after(place / file, first if first else -1)
            log = config.log
            writers[member.name] = metrics_lib.Metrics(
                place, config_lib.to_dict(member.config), log.tensorboard, None, first
            )
            stack.callback(writers[member.name].close)
        board = stack.enter_context(Board(names, steps, first))
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
            given = inference.answers(group.model, variables, prepared.tokenizer, asked, eval_rows)
            for prompt, text, reference in given[:10]:
                record = {"step": step, "prompt": prompt, "text": text, "reference": reference}
                metrics_lib.append_line(workdir / "members" / name / "samples.jsonl", record)
            return sum(text == reference for _, text, reference in given) / len(given)

        def sample(step: int):
            asked, tokenizer, trainables = config.sample.prompts, prepared.tokenizer, jax.device_get(state.trainable)
            rows = [inference.encode_prompt(prompt, "", config.data.format, tokenizer) for prompt in asked]
            for i, name in enumerate(names):
                if name in diverged:
                    continue
                variables = alone(trainables, i)
                texts = inference.complete(group.model, variables, tokenizer, rows, config.sample.max_new_tokens)
                for prompt, text in zip(asked, texts, strict=True):
                    record = {"step": step, "prompt": prompt, "text": text}
                    metrics_lib.append_line(workdir / "members" / name / "samples.jsonl", record)

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
    filled = _filled((state.trainable, state.opt_state), group.count)
    layout = programs.layout
    trainable, opt_state = jax.device_put(filled, _shardings((layout.trainable, layout.opt_state)))
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
            if checkpoints.latest() is not None:  # a run that was killed amid this; half of it may be there
                shutil.rmtree(place / "checkpoints" / str(checkpoints.latest()))
                checkpoints.manager.reload()
            checkpoints.save(at["step"], own, at["data"], meta)
    return own.trainable


def adapter_is_whole(group: Group, member: Member, place: pathlib.Path, step: int) -> bool:
    """Whether what the member trained can be read from its checkpoint."""
    _, shapes = own_model(group, member)
    try:
        with Checkpoints(place, read_only=True) as checkpoints:
            checkpoints.meta(step)
            checkpoints.restore_adapter(step, partition.split(shapes, group.mask)[0])
    except UserError:
        return False
    return True


def result_of(group: Group, member: Member, place: pathlib.Path, trainable: dict, step: int, diverged: int | None):
    lines = metrics_lib.read_lines(place / "metrics.jsonl")
    of = {name: [(line["step"], line[name]) for line in lines if name in line] for name in RECORDED}
    config = member.config
    zeros = padding(config.lora, group.prepared.architecture) if config.adapted else 0
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
