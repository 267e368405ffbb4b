"""Train many adapters over one base, in one compiled step: which rank is enough, at which rate?

    python -m lowrank.sweep --config=configs/rank_sweep.py --workdir=runs/rank_sweep
    python -m lowrank.sweep --config=configs/alpaca.py --workdir=runs/ranks --config.base=DIR --config.data.train=FILE \\
        --config.sweep.lora.rank="(1,4,16,64)" --config.sweep.optim.learning_rate="(1e-4,3e-4,1e-3)"

`config.sweep` mirrors the config: a tuple of values stands where the config has one value, and the members are the product.
Each member equals the same run alone and becomes a workdir under members/; sweep.csv, sweep.md and sweep.png compare them.
The same command again goes on where it was stopped, to the bit; what is finished is not run again.
"""

from absl import flags

from lowrank.cli import run as cli
from lowrank.cli import streams
from lowrank.config import describe_keys
from lowrank.errors import UserError
from lowrank.files import paths

flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, an ml_collections config; --config.KEY=VALUE overrides.")
flags.DEFINE_string("workdir", None, "The folder of this sweep: made if absent, resumed if it holds the same sweep.")
flags.DEFINE_bool("dry_run", False, "Print which members would be trained together, and at what cost; train nothing.")
flags.DEFINE_string("profile", None, "START:STOP, the steps of the first wave to write a trace of, for xprof.")
FLAGS = flags.FLAGS


def main(arguments: list[str]) -> int | None:
    from lowrank import sweeping  # here, so that --help does not wait for JAX

    grid = sweeping.read(FLAGS.config, arguments)
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError("--workdir is missing; say where the sweep is to live, --workdir=runs/NAME")
    paths.local(FLAGS.workdir or "")
    if FLAGS.dry_run:
        print(sweeping.describe(grid, sweeping.plan_groups(grid, paths.path(FLAGS.workdir) if FLAGS.workdir else None)))
        return None
    streams.outlive_stdout("the sweep goes on; its workdir has everything")
    command = cli.command_line("sweep")
    result = sweeping.sweep(grid, FLAGS.workdir, profile=FLAGS.profile, overrides=arguments, command=command)
    return cli.STOPPED if result.stopped_by else None


if __name__ == "__main__":
    cli.run(main, describe_keys())
