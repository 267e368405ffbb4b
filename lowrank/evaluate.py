"""Evaluate a base, with or without an adapter, on a file of examples: loss and perplexity with confidence intervals.

    python -m lowrank.evaluate --base=DIR --data=held_out.json
    python -m lowrank.evaluate --base=DIR --adapter=runs/alpaca --data=held_out.json --to=losses.jsonl
    python -m lowrank.evaluate --base=DIR --adapter=runs/r16 --other=runs/r4 --data=held_out.json

Examples are made (format, length, what is predicted) as the flags say, else as --config does, else as the adapter's run
did. Two adapters are compared example by example.
"""

import math

from absl import flags

from lowrank import evaluation
from lowrank.cli import config_file
from lowrank.cli import run as cli
from lowrank.config import DTYPES, FORMATS
from lowrank.errors import UserError
from lowrank.evaluation.loss import Evaluation, write_losses
from lowrank.files import paths

flags.DEFINE_string("base", None, "The base: a folder with a checkpoint, or a name on the hub.")
flags.DEFINE_string(
    "adapter", None, "An adapter: the workdir of a run, a folder of PEFT or mlx-lm, or a name on the hub."
)
flags.DEFINE_string("step", None, "Which checkpoint of --adapter: a number, best or last. Default: the last.")
flags.DEFINE_string(
    "other", None, "A second adapter, to compare with --adapter (or, without it, with the bare base); DIR@STEP too."
)
flags.DEFINE_string("data", None, "Files of examples, or a data set on the hub.")
flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT: take the data's settings and the mesh from this config.")
flags.DEFINE_string("to", None, "Write the loss of every example to this file, as JSON lines.")
flags.DEFINE_enum("format", None, FORMATS, "What a record is; default: as the adapter's run or --config has it.")
flags.DEFINE_integer("max_length", None, "Tokens of an example at most; default: likewise.", lower_bound=2)
flags.DEFINE_bool("train_on_prompt", None, "Count the prompt's tokens, too; default: likewise.")
flags.DEFINE_bool("packing", True, "Several examples to a row. Changes the speed only.")
flags.DEFINE_integer("batch_size", 16, "Rows computed at once. Changes the speed only.", lower_bound=1)
flags.DEFINE_enum("dtype", None, DTYPES, "Held and computed in; default: as the checkpoint says.")
FLAGS = flags.FLAGS

USED = ("config.data.format", "config.data.max_length", "config.data.train_on_prompt", "config.mesh")
PASSED = ("format", "max_length", "train_on_prompt", "packing", "batch_size", "dtype")  # flags, as `evaluate` has them
FEW = 30  # examples, below which the normal distribution makes an interval too narrow


def main(arguments: list[str]):
    if not FLAGS.config:
        cli.refuse_unknown(arguments)
    cli.require("base", "data")
    to = paths.local(FLAGS.to) if FLAGS.to else None
    if to and to.exists():
        raise UserError(f"--to={to} exists; give a new name or remove it")
    if to and not to.parent.is_dir():
        raise UserError(f"--to={to}: its folder does not exist; make it first")
    unused = [argument for argument in arguments if not argument.lstrip("-").startswith(USED)]
    if unused:
        raise UserError(f"{' '.join(unused)} would change nothing: of --config only {', '.join(USED)} are used")
    options = {name: FLAGS[name].value for name in PASSED}
    options["config"] = config_file.read(FLAGS.config, arguments) if FLAGS.config else None
    if FLAGS.step and not FLAGS.adapter:
        raise UserError(f"--step={FLAGS.step} names a checkpoint, but there is no --adapter; leave one out")
    adapter = f"{FLAGS.adapter}@{FLAGS.step}" if FLAGS.step else FLAGS.adapter
    result = evaluation.evaluate(FLAGS.base, FLAGS.data, adapter, FLAGS.other, **options)
    print(describe_examples(result, FLAGS.data))
    print(describe_losses(result, adapter or "base", FLAGS.other))
    if to:
        write_losses(to, result)
        print(f"losses of {len(result.tokens):,} examples in {to}")


def describe_examples(result: Evaluation, data: str) -> str:
    settings, examples = result.settings, result.examples
    predicted = "all tokens" if settings.format == "text" or settings.train_on_prompt else "responses"
    return (
        f"format {settings.format}, {settings.max_length} tokens at most, {predicted} predicted (--format, --max_length "
        f"and --train_on_prompt change that)\n"
        f"{data}: {len(examples.examples):,} examples, {examples.trained_tokens:,} tokens to predict; "
        f"{examples.truncated:,} truncated, {examples.dropped:,} dropped with nothing to predict"
    )


def describe_losses(result: Evaluation, name: str, other: str | None) -> str:
    """A line for each model, and how they differ."""
    width = max(len(name), len(other or ""))
    lines = [f"{name:<{width}}  {_loss_and_perplexity(*result.loss)}"]
    if other:
        lines.append(f"{other:<{width}}  {_loss_and_perplexity(*result.other_loss)}")
        mean, margin = result.difference
        better = f"{name if mean < 0 else other} is better"
        verdict = better if margin is not None and abs(mean) > margin else "no difference can be told"
        interval = "" if margin is None else f" ± {margin:.6f}, example by example: {verdict}"
        lines.append(f"{name} minus {other}: loss {mean:+.6f}{interval}")
    count = len(result.tokens)
    if count == 1:
        lines.append("note: there is no interval from one example")
    elif count < FEW:
        lines.append(f"note: intervals from {count} examples are too narrow; {FEW} or more make them trustworthy")
    return "\n".join(lines)


def _loss_and_perplexity(mean: float, margin: float | None) -> str:
    if margin is None:
        return f"loss {mean:.6f}  perplexity {_perplexity(mean)}"
    interval = f"{_perplexity(mean - margin)} to {_perplexity(mean + margin)}"
    return f"loss {mean:.6f} ± {margin:.6f}  perplexity {_perplexity(mean)} ({interval})"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4f}" if loss < 30 else f"{math.exp(min(loss, 700)):.3g}"


if __name__ == "__main__":
    cli.run(main)
