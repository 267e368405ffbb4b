"""Train an adapter (or, with `train.mode = "full"`, the whole model) over a base.

    python -m lowrank.train --config=configs/alpaca.py --workdir=runs/alpaca --config.base=DIR --config.data.train=FILE

The same command again resumes: the metrics and the adapter are then bitwise those of a run that was never stopped.
SIGTERM and Ctrl-C finish the step, save, and end with exit code 75; a second Ctrl-C does not wait for the step.
--profile=11:13 writes a trace of these steps into the workdir, for xprof.
"""

import contextlib
import math
import time

import jax
import numpy as np
from absl import flags

from lowrank import config as config_lib
from lowrank import formatting
from lowrank.cli import config_file, signals
from lowrank.cli import run as cli
from lowrank.cli.run import STOPPED
from lowrank.errors import UserError
from lowrank.files import lines as lines_lib
from lowrank.files import paths
from lowrank.inference import answers as answers_lib
from lowrank.inference import text as text_lib
from lowrank.model.flops import step_flops
from lowrank.parallel import distributed
from lowrank.parallel import mesh as mesh_lib
from lowrank.runs import adapter as adapters
from lowrank.runs import curves, metrics, report
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.console import Console
from lowrank.runs.inputs import (
    check_mesh,
    evaluation_batches,
    facts,
    identity,
    initial_variables,
    on_devices,
    prepare,
    training_batches,
)
from lowrank.runs.metrics import due
from lowrank.runs.profiling import Profile
from lowrank.runs.setup import abstract_step
from lowrank.runs.speed import Speed, product_flops
from lowrank.training import partition
from lowrank.training.step import init_state, make_eval_step, make_train_step

flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, an ml_collections config; --config.KEY=VALUE overrides.")
flags.DEFINE_string("workdir", None, "The folder of this run: made if absent, resumed if it holds the same run.")
flags.DEFINE_bool("dry_run", False, "Print what would be trained on what, and at what cost; train nothing.")
flags.DEFINE_string(
    "coordinator", None, "Several processes: HOST:PORT of process 0. Not needed on a TPU slice, under srun, mpirun."
)
flags.DEFINE_integer("processes", None, "Several processes: how many; as above.")
flags.DEFINE_integer("process", None, "Several processes: which one this is, from 0; as above.")
flags.DEFINE_float("coordinator_timeout", 300, "Several processes: how long to wait for all of them, in seconds.")
flags.DEFINE_string("profile", None, "START:STOP, the first and the last step to write a trace of, for xprof.")
FLAGS = flags.FLAGS


def main(arguments: list[str]) -> int | None:
    processes = distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.coordinator_timeout)
    config = config_file.read(FLAGS.config, arguments)
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError("--workdir is missing; say where the run is to live, --workdir=runs/NAME")
    workdir = paths.path(FLAGS.workdir or "")
    if config.log.tensorboard and paths.is_remote(workdir):
        raise UserError(
            "config.log.tensorboard appends to its files, which a bucket cannot; leave it out, or name a local --workdir"
        )

    profile = Profile(FLAGS.profile, workdir)

    # ---- Base, tokenizer, data: everything a user can get wrong is found before anything heavy begins.
    prepared = prepare(config)
    run_identity = identity(config, prepared)
    distributed.refuse_differences(facts(config, run_identity), "give all of them the same command, code and files")
    base, architecture, tokenizer = prepared.base, prepared.architecture, prepared.tokenizer
    held_out, steps = prepared.held_out, prepared.steps
    profile.check(steps)
    mesh = mesh_lib.make_mesh(config.mesh)
    check_mesh(mesh, config, architecture)
    begun = bool(FLAGS.workdir) and distributed.from_first((workdir / "config.json").exists)
    if config.init_adapter:
        config = adapters.with_ranks_of_start(config, base, workdir if begun else None)

    # ---- Model, mask, optimizer: abstract first; nothing is computed yet.
    setup = abstract_step(config, architecture, mesh, steps)
    model, shapes, mask, optimizer = setup.model, setup.shapes, setup.mask, setup.optimizer
    distributed.refuse_differences({"attention": model.attention}, "say which with --config.attention")
    if config.init_adapter and not begun:  # whether it fits is found out before there is a workdir
        adapters.open_adapter(config, base).restore({"lora": shapes["lora"]})

    if processes:
        print(f"processes  {processes}")
    print(report.describe_model(config, architecture, mesh, setup.state.trainable, setup.frozen, optimizer))
    print(report.describe_data(config, prepared))
    if FLAGS.dry_run:
        print(report.describe_leaves(shapes, mask))
        return None

    # ---- Workdir: a new run, or the same one again.
    with (
        workdir_lib.open_workdir(workdir, config, run_identity, arguments, "train"),
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
    ):
        # ---- State: from the last checkpoint, else from the beginning.
        batches = training_batches(config, prepared.train)
        first = distributed.from_first(checkpoints.latest) or 0
        # A resumed run loads the frozen leaves alone: the trained ones stay shapes until the checkpoint fills them.
        made = set(shapes) - ({"lora" if config.adapter else "params"} if first else set())
        variables = initial_variables(config, model, base, shapes, made)
        trainable, frozen = partition.split(variables, mask)
        layout, key = setup.state, jax.random.key(config.seed)
        tokens = 0
        if first:
            state, position = checkpoints.restore(first, layout)
            step = mesh_lib.put(np.int32(first), layout.step.sharding)
            state = state._replace(step=step, key=mesh_lib.put(key, layout.key.sharding))
            batches.set_state(position)
            meta = checkpoints.meta(first)
            tokens = meta["tokens"]
            if meta["config"]["mesh"] != config_lib.to_dict(config)["mesh"]:
                print(
                    "the mesh is another one now: sums run in another order, so the run is not bitwise what it would have been"
                )
        else:
            state = init_state(optimizer, trainable, key, layout)
        del variables, trainable  # the step donates these arrays: nothing else may hold on to them
        for file in ("metrics.jsonl", "samples.jsonl"):
            lines_lib.forget_after(workdir / file, first if first else -1)
        if first >= steps:
            curves.plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", workdir.name)
            print(f"the run in {workdir} is complete at step {first}; raise config.train.steps to go on")
            return None
        if first:
            print(f"resumed from step {first}")
            if left_out := profile.resumed(first):
                print(left_out)

        # ---- Evaluation and samples.
        shards = mesh_lib.batch_shards(mesh)
        train_step = distributed.together(
            make_train_step(model, optimizer, setup.schedule, config.train.microbatches, shards, layout)
        )
        eval_step = distributed.together(make_eval_step(model, shards))
        eval_batches, eval_rows = (
            evaluation_batches(config, held_out),
            config.train.batch_size // config.train.microbatches,
        )
        writer = metrics.Metrics(workdir, config_lib.to_dict(config), config.log.tensorboard, config.log.wandb, first)
        console = Console(steps, first)
        rows, length = config.train.batch_size, config.data.max_length
        flops = step_flops(architecture, config.adapter, rows, length, config.remat, config.train.mode)
        device = jax.local_devices()[0]
        # Several CPU devices share the machine's cores, so what one of them reaches alone says nothing of all.
        known = config.log.every and distributed.first() and (device.platform != "cpu" or mesh.devices.size == 1)
        ceiling = mesh.devices.size * product_flops(device, model.dtype) if known else None
        speed = Speed(lambda trained: flops.needed(trained / (rows * length)), ceiling)

        def evaluate(step: int) -> float:
            """Write the evaluation of `step` and return its loss."""
            total, count = 0.0, 0
            for batch in eval_batches:
                with jax.set_mesh(mesh):
                    loss, trained = eval_step(state.trainable, frozen, on_devices(batch, mesh))
                total, count = total + float(loss), count + int(trained)
            loss = total / count
            if not math.isfinite(loss):
                raise UserError(f"step {step}: the evaluation loss is {loss}; {intact(checkpoints)}; {REMEDY}")
            scalars = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}
            if config.eval.answers:
                scalars["eval/exact_match"] = answer(step)
            writer.write(step, scalars)
            shown = "  ".join(f"{name} {formatting.show(value)}" for name, value in scalars.items())
            console.say(f"step {step}/{steps}  {shown}")
            return loss

        def answer(step: int) -> float:
            """Answer held-out examples greedily; the share of answers equal to the reference. The first ten are kept."""
            asked = held_out.examples[: config.eval.answers]
            given = answers_lib.answers(model, partition.merge(state.trainable, frozen), tokenizer, asked, eval_rows)
            for prompt, text, reference in given[:10]:
                record = {"step": step, "prompt": prompt, "text": text, "reference": reference}
                lines_lib.append_line(workdir / "samples.jsonl", record)
            return sum(text == reference for _, text, reference in given) / len(given)

        def sample(step: int):
            rows = [text_lib.encode_prompt(prompt, "", config.data.format, tokenizer) for prompt in config.sample.prompts]
            variables = partition.merge(state.trainable, frozen)
            texts = text_lib.complete(model, variables, tokenizer, rows, config.sample.max_new_tokens)
            for prompt, text in zip(config.sample.prompts, texts, strict=True):
                lines_lib.append_line(workdir / "samples.jsonl", {"step": step, "prompt": prompt, "text": text})
                console.say(f"step {step}/{steps}  {prompt!r} -> {text!r}")

        # ---- The loop: step, read the step before, evaluate, sample, save. The order matters: a checkpoint is made
        # after everything up to its step is written, and only of a state whose loss has been seen to be finite.
        began = time.monotonic()
        pending = None
        best = distributed.from_first(lambda: best_loss(workdir))

        def read_pending():
            """Wait for the pending step's scalars, refuse what is not finite, and log it if it is due."""
            nonlocal pending, tokens
            if pending is None:
                return
            step, scalars, examples = pending
            pending = None
            scalars = jax.device_get(scalars)
            if not (np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"])):
                raise UserError(not_finite(step, scalars, examples, checkpoints))
            tokens += int(scalars["tokens"])
            speed.read(int(scalars["tokens"]), int(scalars["trained_tokens"]))
            if not ((config.log.every and step == 1) or due(step, config.log.every, steps)):
                console.step(step, None)
                return
            rates = {f"train/{name}": value for name, value in speed.rates().items()}
            line = {f"train/{name}": float(scalars[name]) for name in ("loss", "grad_norm", "learning_rate")}
            line["train/tokens"] = tokens
            writer.write(step, line | {"train/tokens_per_second": rates["train/tokens_per_second"]})
            console.step(step, line | rates)

        distributed.barrier("loaded")  # some have more of the base to read than others
        with (
            signals.stop_signals() as stop,
            contextlib.closing(writer),
            contextlib.closing(console),
            contextlib.closing(profile),
        ):
            if first == 0:
                if eval_batches and config.eval.every:
                    best = min(best, evaluate(0))
                if config.sample.every:
                    sample(0)
            speed.start()
            for step in range(first + 1, steps + 1):
                batch = next(batches)
                arrays = on_devices(batch, mesh)
                speed.dispatches(idle=pending is None or pending[1]["loss"].is_ready())
                with speed.paused():
                    profile.before(step)
                with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, scalars = train_step(state, frozen, arrays)
                if step == profile.stop:
                    jax.block_until_ready(scalars)
                    with speed.paused():
                        profile.close()
                    console.say(profile.written)
                read_pending()
                pending = (step, scalars, batch["examples"])

                evaluates = bool(eval_batches) and due(step, config.eval.every, steps)
                samples = due(step, config.sample.every, steps)
                saves = step == steps or due(step, config.checkpoint.every, steps)
                # Asked once a step: of several processes, all have the same answer at the same step.
                stopped_by = stop(step)
                if evaluates or samples or saves or stopped_by:
                    read_pending()
                    with speed.paused():
                        eval_loss = evaluate(step) if evaluates else None
                        if samples:
                            sample(step)
                        better = eval_loss is not None and eval_loss < best
                        best = eval_loss if better else best
                        if saves or better or stopped_by:
                            meta = {"step": step, "tokens": tokens, "config": config_lib.to_dict(config)}
                            meta |= {"identity": run_identity, "versions": workdir_lib.versions()}
                            lines_lib.flush_lines()
                            checkpoints.save(step, state, batches.get_state(), meta, eval_loss)
                    if stopped_by and step < steps:
                        checkpoints.wait()
                        console.say(
                            f"stopped by {stopped_by} after step {step}, which is saved; "
                            "run the same command again to go on"
                        )
                        return STOPPED
            checkpoints.wait()

    # ---- What came of it.
    if distributed.first():
        curves.plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", workdir.name)
        print(report.closing(workdir, config, tokens, steps - first, time.monotonic() - began))
    return None


# ---- In the loop -----------------------------------------------------------------------------------------------------


REMEDY = "use a lower config.optim.learning_rate, in another --workdir"


def intact(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    last = checkpoints.latest()
    return f"the checkpoint of step {last} is intact" if last else "no checkpoint was written yet"


def not_finite(step: int, scalars: dict, examples: np.ndarray, checkpoints: Checkpoints) -> str:
    ids = sorted(set(examples[examples >= 0].tolist()))
    return (
        f"step {step}: the loss is {scalars['loss']} and the gradient's norm {scalars['grad_norm']}; its examples are "
        f"{', '.join(map(str, ids))} (counted from 0 in the training file); {intact(checkpoints)}; look at these examples, "
        f"or {REMEDY}"
    )


def best_loss(workdir: paths.Path) -> float:
    """The best evaluation so far, from the metrics that are left after resuming."""
    losses = [line["eval/loss"] for line in lines_lib.read_lines(workdir / "metrics.jsonl") if "eval/loss" in line]
    return min(losses, default=math.inf)


if __name__ == "__main__":
    cli.run(main)
