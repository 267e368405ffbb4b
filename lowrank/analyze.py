"""Analyze what an adapter does to its base: how strong each update is, how many directions it uses, what it amplifies.

    python -m lowrank.analyze --adapter=runs/r16 --to=analysis/r16
    python -m lowrank.analyze --adapter=runs/r64 --other=runs/r8 --to=analysis/r64-and-r8

The questions of section 7 of the LoRA paper. With --other, a second adapter over the same base (another rank, another
seed), also: which directions do the two share? Writes analysis.md, tables as CSV and pictures into a new folder.
"""

from absl import flags

from lowrank.cli import run as cli

flags.DEFINE_string(
    "adapter", None, "An adapter: the workdir of a run, a folder of PEFT or mlx-lm, or a name on the hub."
)
flags.DEFINE_string("step", None, "Which checkpoint of --adapter: a number, best or last. Default: the last.")
flags.DEFINE_string("other", None, "A second adapter over the same base, to compare directions with; DIR@STEP too.")
flags.DEFINE_string("base", None, "The base; default: the one that the adapter's run names.")
flags.DEFINE_string("to", None, "The folder to make.")
FLAGS = flags.FLAGS


def main(arguments: list[str]):
    from lowrank import analysis  # here, so that --help does not wait for JAX

    cli.refuse_unknown(arguments)
    cli.require("adapter", "to")
    result = analysis.analyze(FLAGS.adapter, FLAGS.other, FLAGS.base, FLAGS.step)
    analysis.write_analysis(result, FLAGS.to)
    count = sum(map(len, result.modules.values()))
    print(f"analysis of {count} updates in {FLAGS.to}; read {FLAGS.to}/analysis.md first")


if __name__ == "__main__":
    cli.run(main)
