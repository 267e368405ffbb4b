"""Evaluate a base, with or without an adapter, on a file of examples: loss and perplexity with confidence intervals.

    python -m lowrank.evaluate --base=DIR --data=held_out.json
    python -m lowrank.evaluate --base=DIR --adapter=runs/alpaca --data=held_out.json --to=losses.jsonl
    python -m lowrank.evaluate --base=DIR --adapter=runs/r16 --other=runs/r4 --data=held_out.json

Examples are made (format, length, what is predicted) as the flags say, else as --config does, else as the adapter's run
did. Two adapters are compared example by example.
"""

from absl import flags

from lowrank.cli import config_file
from lowrank.cli import run as cli
from lowrank.config import DTYPES, FORMATS, describe_keys
from lowrank.errors import UserError
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
flags.DEFINE_enum(
    "format", None, ("auto", *FORMATS), "What a record is; default: as the adapter's run or --config has it."
)
flags.DEFINE_integer("max_length", None, "Tokens of an example at most; default: likewise.", lower_bound=2)
flags.DEFINE_bool("train_on_prompt", None, "Count the prompt's tokens, too; default: likewise.")
flags.DEFINE_bool("packing", True, "Several examples to a row. Changes the speed only.")
flags.DEFINE_integer("batch_size", 16, "Rows computed at once. Changes the speed only.", lower_bound=1)
flags.DEFINE_enum("dtype", None, DTYPES, "Held and computed in; default: as the checkpoint says.")
FLAGS = flags.FLAGS

USED = (
    *(f"config.data.{name}" for name in ("format", "columns", "system", "max_length", "overflow", "train_on_prompt")),
    "config.mesh",
)
PASSED = ("format", "max_length", "train_on_prompt", "packing", "batch_size", "dtype")  # flags, as `evaluate` has them


def main(arguments: list[str]):
    from lowrank import evaluation  # here, so that --help does not wait for JAX

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
    options |= {"step": FLAGS.step, "progress": True}
    result = evaluation.evaluate(FLAGS.base, FLAGS.data, FLAGS.adapter, FLAGS.other, **options)
    adapter = f"{FLAGS.adapter}@{FLAGS.step}" if FLAGS.step else FLAGS.adapter
    print(evaluation.describe_examples(result, FLAGS.data))
    print(evaluation.describe_losses(result, adapter or "base", FLAGS.other))
    if to:
        evaluation.write_losses(to, result)
        print(f"losses of {len(result.tokens):,} examples in {to}")


if __name__ == "__main__":
    cli.run(main, describe_keys(tuple(name.removeprefix("config.") for name in USED)))
