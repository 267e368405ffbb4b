"""One training run: what it needs is found and checked, the loop runs, and a `Result` says what came of it."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from lowrank import config as config_lib
from lowrank.cli.signals import stop_signals
from lowrank.config import Config
from lowrank.data.loader import TrainLoader
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.lines import flush_lines, forget_after, read_lines
from lowrank.formatting import format_number
from lowrank.parallel import distributed
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import compile_together
from lowrank.runs import inputs as inputs_lib
from lowrank.runs import report
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.adapter import Adapter, read_adapter, read_init_adapter, with_ranks_of
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.console import progress
from lowrank.runs.curves import plot_curves
from lowrank.runs.inputs import RunInputs
from lowrank.runs.loop import StepResult, due, run_steps
from lowrank.runs.metrics import Metrics, best_evaluation, evaluation_scalars, evaluation_sums
from lowrank.runs.profiling import Profile
from lowrank.runs.samples import write_answers, write_samples
from lowrank.runs.setup import Step, abstract_step
from lowrank.runs.speed import make_speed
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule
from lowrank.training.step import State, init_state, make_eval_step

REMEDY = "use a lower config.optim.learning_rate, in another --workdir"
NOT_WRITTEN = ("train/mfu", "train/waiting")  # shown on the console only: they are the machine's, not the run's


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before it computes: everything that can be refused has been checked, and nothing is written."""

    config: Config
    workdir: paths.Path
    inputs: RunInputs
    identity: dict
    setup: Step
    profile: Profile
    init_adapter: Adapter | None  # the opened `config.init_adapter`; None for a workdir that holds the run already


class Begun(NamedTuple):
    """A run whose variables are on the devices, and whose data stands at its place."""

    step: int  # the last one that is done; 0 for a run from the beginning
    state: State
    frozen: dict
    batches: TrainLoader
    tokens: int  # that were seen


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run, as its workdir has it."""

    workdir: paths.Path
    step: int  # the last one
    losses: dict[int, float]  # step -> training loss, of the logged steps
    eval_losses: dict[int, float]  # step -> evaluation loss
    stopped_by: str | None  # the signal that stopped the run; None: it is complete

    @property
    def checkpoint(self) -> paths.Path:
        return self.workdir / "checkpoints" / str(self.step)

    @property
    def adapter(self) -> Adapter:
        """The last checkpoint's adapter, opened: `lowrank.load(base, result.adapter)` reads it."""
        return read_adapter(self.workdir, self.step)


def train(
    config: Config | ml_collections.ConfigDict,
    workdir: str | paths.Path,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    command: str = "lowrank.runs.train",
) -> Result:
    """Train a run to its end, or resume the one that `workdir` holds; SIGTERM, SIGHUP and Ctrl-C finish the step and save.

    `profile`: "START:STOP", the steps to trace for xprof. `overrides` and `command` are recorded in `config.json`.
    Raises UserError for whatever the config or its files have wrong, and for a loss that is not finite.
    """
    run = prepare_run(config, workdir, profile)
    folder, steps = run.workdir, run.inputs.steps
    print(describe(run))
    with (
        workdir_lib.open_workdir(folder, run.config, run.identity, overrides, command),
        Checkpoints(folder, run.config.checkpoint.keep) as checkpoints,
        contextlib.closing(run.profile),
    ):
        begun = _begin(run, checkpoints)
        first = begun.step
        for name in ("metrics.jsonl", "samples.jsonl"):
            forget_after(folder / name, first or -1)
        if first >= steps:
            plot_curves(folder)
            print(f"the run in {folder} is complete at step {first}; raise config.train.steps to go on")
            return read_result(folder, first)
        if first:
            print(f"resumed from step {first}")
            if left_out := run.profile.skip_until(first):
                print(left_out)
        step, tokens, stopped_by, seconds = _loop(run, checkpoints, begun)
        distributed.barrier("written")  # the first process has flushed its lines, which all read
        if not stopped_by and distributed.is_first():
            plot_curves(folder)
            print(report.closing(folder, run.config, tokens, steps - first, seconds))
        return read_result(folder, step, stopped_by)


def prepare_run(
    config: Config | ml_collections.ConfigDict, workdir: str | paths.Path | None, profile: str | None = None
) -> Run:
    """Find and check what the config names. Without a workdir the run can only be described."""
    config = config_lib.check(config) if isinstance(config, Config) else config_lib.from_values(config)
    folder = paths.path(workdir or "")
    if config.log.tensorboard and paths.is_remote(folder):
        raise UserError(
            "config.log.tensorboard appends to its files, which a bucket cannot; leave it out, or name a local --workdir"
        )
    inputs = inputs_lib.prepare(config, folder if workdir else None)
    config = inputs_lib.with_format(config, inputs.format)
    identity = inputs_lib.identity(config, inputs)
    facts = inputs_lib.facts(config, identity)
    distributed.refuse_differences(facts, "give all of them the same command, code and files")
    profiled = Profile(profile, folder, inputs.steps)
    mesh = mesh_lib.make_mesh(config.mesh)
    inputs_lib.check_mesh(mesh, config, inputs.architecture)
    start = None
    if config.init_adapter:
        if workdir and distributed.broadcast_from_first((folder / "config.json").exists):
            config = with_ranks_of(config, workdir_lib.read_config(folder).lora)
        else:
            start = read_init_adapter(config, inputs.base)
            config = with_ranks_of(config, start.lora)
    setup = abstract_step(config, inputs.architecture, mesh, inputs.steps)
    distributed.refuse_differences({"attention": setup.model.attention}, "say which with --config.attention")
    if start:  # whether it fits is found out before there is a workdir
        start.restore({"lora": setup.shapes["lora"]})
    return Run(config, folder, inputs, identity, setup, profiled, start)


def describe(run: Run, leaves: bool = False) -> str:
    """What would be trained on what, and at what cost; `leaves`: every parameter, too."""
    model = report.describe_model(run.config, run.inputs.architecture, run.setup)
    parts = [model, report.describe_data(run.config, run.inputs)]
    if leaves:
        parts.append(report.describe_leaves(run.setup.shapes, run.setup.mask))
    return "\n".join(parts)


def _begin(run: Run, checkpoints: Checkpoints) -> Begun:
    """Load the run's variables: from its last checkpoint, else from the beginning."""
    config, setup, start = run.config, run.setup, run.init_adapter
    batches = inputs_lib.training_batches(config, run.inputs.train)
    first = distributed.broadcast_from_first(checkpoints.latest) or 0
    # A resumed run loads the frozen leaves alone: the trained ones stay shapes until the checkpoint fills them.
    made = set(setup.shapes) - ({"lora" if config.adapter else "params"} if first else set())
    if config.init_adapter and not first and start is None:  # a run that was stopped before its first checkpoint
        start = read_init_adapter(config, run.inputs.base)
    variables = inputs_lib.initial_variables(config, setup.model, run.inputs.base, setup.shapes, made, start)
    trainable, frozen = partition.split(variables, setup.mask)
    layout, key = setup.state, jax.random.key(config.seed)
    if not first:
        return Begun(0, init_state(setup.optimizer, trainable, key, layout), frozen, batches, 0)
    state, position = checkpoints.restore(first, layout)
    batches.set_state(position)
    meta = checkpoints.meta(first)
    for line in _said_on_resume(run, first, meta):
        print(line)
    step = mesh_lib.put(np.int32(first), layout.step.sharding)
    state = state._replace(step=step, key=mesh_lib.put(key, layout.key.sharding))
    return Begun(first, state, frozen, batches, meta["tokens"])


def _said_on_resume(run: Run, first: int, meta: dict) -> list[str]:
    """What has changed since the checkpoint that a run resumes from, and matters; a schedule that jumps is warned of."""
    config, lines = run.config, []
    before = config_lib.from_values(meta["config"])
    loose = [key for key in workdir_lib.changed_keys(meta["config"], config) if key in workdir_lib.NOT_BITWISE]
    if loose:
        names = ", ".join(dict.fromkeys("mesh" if key.startswith("mesh.") else key for key in loose))
        lines.append(f"{names} changed: the reduction order differs, so the run is no longer bitwise reproducible")
    if meta["identity"].get("data.eval") != run.identity["data.eval"]:
        lines.append(
            f"data.eval has other content: losses up to step {first} were evaluated on other examples than from here on"
        )
    rate = float(run.setup.schedule(first))
    planned = learning_rate_schedule(before.optim, inputs_lib.steps_over(run.inputs.rows, before))
    if first < run.inputs.steps and not math.isclose(planned(first), rate, rel_tol=1e-6):
        warnings.warn(
            f"config.optim.schedule={config.optim.schedule} now ends at step {run.inputs.steps}: the learning rate goes from "
            f"{planned(first - 1):.3g} in step {first} to {rate:.3g} in step {first + 1}, where it was to be {planned(first):.3g}",
            stacklevel=2,
        )
    return lines


def _loop(run: Run, checkpoints: Checkpoints, begun: Begun) -> tuple[int, int, str | None, float]:
    """Log, evaluate, sample and save; a checkpoint is made after everything up to its step is written.

    -> the last step, the tokens seen, the signal that stopped the run, the seconds that it took.
    """
    config, workdir, inputs, setup = run.config, run.workdir, run.inputs, run.setup
    first, state, frozen, batches, tokens = begun
    steps, model, samples_file = inputs.steps, setup.model, workdir / "samples.jsonl"
    train_step = compile_together(setup.function)
    eval_step = compile_together(make_eval_step(model))
    eval_batches = inputs_lib.evaluation_batches(config, inputs.held_out)
    speed = make_speed(setup.mesh, model.dtype, config, [(inputs.architecture, config.adapter)])
    best = distributed.broadcast_from_first(lambda: best_evaluation(workdir)[0])
    distributed.barrier("loaded")  # some processes have more of the base to read than others
    began, stopped_by, step = time.monotonic(), None, first
    with (
        stop_signals(first, steps) as stop,
        contextlib.closing(Metrics(workdir, config, first)) as metrics,
        progress(steps, first) as show_step,
    ):

        def log(done: StepResult):
            line = None
            if (config.log.every and done.step == 1) or due(done.step, config.log.every, steps):
                line = training_scalars(done, tokens) | speed.rates()
                metrics.write(done.step, {name: line[name] for name in line if name not in NOT_WRITTEN})
            show_step(done.step, line)

        def evaluate(state: State) -> float:
            total, count = evaluation_sums(eval_step, eval_batches, setup.mesh, state.trainable, frozen)
            loss = float(total / count)
            if not math.isfinite(loss):
                raise UserError(f"step {step}: the evaluation loss is {loss}; {intact(checkpoints)}; {REMEDY}")
            scalars = evaluation_scalars(loss)
            if config.eval.answers:
                variables = partition.merge(state.trainable, frozen)
                scalars["eval/exact_match"] = write_answers(samples_file, step, model, variables, inputs, config)
            metrics.write(step, scalars)
            shown = "  ".join(f"{name} {format_number(x)}" for name, x in scalars.items())
            print(f"step {step}/{steps}  {shown}", flush=True)
            return loss

        def sample(variables: dict):
            for prompt, text in write_samples(samples_file, step, model, variables, inputs, config):
                print(f"step {step}/{steps}  {prompt!r} -> {text!r}", flush=True)

        def save(state: State, loss: float | None):
            meta = {"step": step, "tokens": tokens, "config": config_lib.to_dict(config)}
            meta |= {"identity": run.identity, "versions": workdir_lib.versions()}
            flush_lines()
            checkpoints.save(step, state, batches.get_state(), meta, loss)

        for tick in run_steps(
            lambda state, batch, _: train_step(state, frozen, batch),
            state, batches, setup.mesh, config, first, steps, stop, speed, run.profile,
        ):  # fmt: skip
            step = tick.step
            if 0 < step == run.profile.stop:
                print(run.profile.describe(), flush=True)
            for done in tick.results:
                refuse_not_finite(done, checkpoints)
                tokens += int(done.metrics.tokens)
                log(done)
            if not tick.pauses:
                continue
            with speed.paused():
                loss = evaluate(tick.state) if tick.evaluates and eval_batches else None
                if tick.samples:
                    sample(partition.merge(tick.state.trainable, frozen))
                better = loss is not None and loss < best
                best = min(best, math.inf if loss is None else loss)
                if tick.saves or (better and step > 0) or tick.stopped_by:
                    save(tick.state, loss)
            if tick.stopped_by and step < steps:
                stopped_by = tick.stopped_by
                checkpoints.wait()
                again = "run the same command again to go on"
                print(f"stopped by {stopped_by} after step {step}, which is saved; {again}", flush=True)
        checkpoints.wait()
    return step, tokens, stopped_by, time.monotonic() - began


def training_scalars(result: StepResult, tokens: int, member: int | None = None) -> dict[str, float]:
    """The scalars of a step (of one member of a wave) under their names in `metrics.jsonl`."""
    values = result.metrics if member is None else jax.tree.map(lambda leaf: leaf[member], result.metrics)
    scalars = {"loss": values.loss, "grad_norm": values.grad_norm, "learning_rate": values.learning_rate}
    return {f"train/{name}": float(value) for name, value in scalars.items()} | {"train/tokens": tokens}


def read_result(workdir: paths.Path, step: int, stopped_by: str | None = None) -> Result:
    """The result of a run from the lines in its workdir."""
    lines = read_lines(workdir / "metrics.jsonl")
    losses, eval_losses = (
        {line["step"]: line[name] for line in lines if name in line} for name in ("train/loss", "eval/loss")
    )
    return Result(workdir, step, losses, eval_losses, stopped_by)


def refuse_not_finite(result: StepResult, checkpoints: Checkpoints) -> None:
    """UserError for a loss or a gradient that is not finite; it names the step's examples."""
    loss, grad_norm = result.metrics.loss, result.metrics.grad_norm
    if np.isfinite(loss) and np.isfinite(grad_norm):
        return
    ids = sorted(set(result.examples[result.examples >= 0].tolist()))
    raise UserError(
        f"step {result.step}: the loss is {loss} and the gradient's norm {grad_norm}; its examples are "
        f"{', '.join(map(str, ids))} (counted from 0 in the training file); {intact(checkpoints)}; look at these examples, "
        f"or {REMEDY}"
    )


def intact(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest()
    return f"the checkpoint of step {last} is intact" if last else "no checkpoint was written yet"
