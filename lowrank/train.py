"""Train an adapter (or, with `train.mode = "full"`, the whole model) over a base.

    python -m lowrank.train --config=configs/alpaca.py --workdir=runs/alpaca --config.base=DIR --config.data.train=FILE

The same command again resumes: the metrics and the adapter are then bitwise those of a run that was never stopped.
SIGTERM, SIGHUP and Ctrl-C finish the step, save, and end with exit code 75; a second Ctrl-C does not wait for the step.
--profile=11:13 writes a trace of these steps into the workdir, for xprof.
"""

from absl import flags

from lowrank.cli import config_file, streams
from lowrank.cli import run as cli
from lowrank.config import describe_keys
from lowrank.errors import UserError
from lowrank.parallel import distributed

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
    from lowrank import runs  # here, so that --help does not wait for JAX

    joined = distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.coordinator_timeout)
    if joined:
        print(f"processes  {joined}")
    config = config_file.read(FLAGS.config, arguments)
    if FLAGS.dry_run:
        print(runs.describe(runs.prepare_run(config, FLAGS.workdir, FLAGS.profile), leaves=True))
        return None
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; say where the run is to live, --workdir=runs/NAME")
    streams.outlive_stdout("the run goes on; its workdir has everything")
    result = runs.train(
        config, FLAGS.workdir, profile=FLAGS.profile, overrides=arguments, command=cli.command_line("train")
    )
    return cli.STOPPED if result.stopped_by else None


if __name__ == "__main__":
    cli.run(main, describe_keys())
