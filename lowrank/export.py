"""Write what was trained in a form that others load: a PEFT adapter, or a whole Hugging Face model with it merged in.

    python -m lowrank.export --workdir=runs/alpaca --format=peft --to=exports/alpaca-lora
    python -m lowrank.export --workdir=runs/alpaca --format=merged --to=exports/alpaca --push=me/alpaca

An export is read back before it is called done: every tensor is compared, and the logits of fixed tokens with those
of the trained model. Its README.md is a model card, written from the run.
"""

from absl import flags

from lowrank.cli import run as cli
from lowrank.formatting import format_number

flags.DEFINE_string("workdir", None, "The workdir of the run.")
flags.DEFINE_string("step", None, "Which checkpoint: a number, best (by evaluation loss) or last. Default: the last.")
flags.DEFINE_enum("format", None, ["peft", "merged"], "peft: the adapter alone; merged: the whole model.")
flags.DEFINE_string("to", None, "The folder to make.")
flags.DEFINE_string("base", None, "The base, if it is no longer where it was in training.")
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of merged tensors; default: as the base is stored."
)
flags.DEFINE_string(
    "base_name", None, "What the export calls its base: a name on the hub or a path. Default: where the base lies here."
)
flags.DEFINE_string(
    "push", None, "Also upload the export and the run's record: org/name or org/name@branch on the hub."
)
FLAGS = flags.FLAGS


def main(arguments: list[str]):
    from lowrank import inference  # here, so that --help does not wait for JAX

    cli.refuse_unknown(arguments)
    cli.require("workdir", "format", "to")
    options = {name: FLAGS[name].value for name in ("step", "base", "base_name", "dtype", "push")}
    made = inference.export(FLAGS.workdir, FLAGS.to, FLAGS.format, **options)
    if made.better:
        better, loss, own = made.better
        print(
            f"step {better} has a lower evaluation loss ({format_number(loss)}) than the exported step {made.step} "
            f"({'not evaluated' if own is None else format_number(own)}): --step=best exports it"
        )
    print(
        f"exported to {made.folder}; read back, every tensor equal, logits within {made.difference:.2g} of the largest "
        f"({made.dtype})"
    )
    if made.url:
        print(f"uploaded: {made.url} (a new repository is private; its settings make it public)")


if __name__ == "__main__":
    cli.run(main)
