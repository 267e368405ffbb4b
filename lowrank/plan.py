"""What a training will need and cost, before a dollar is spent: its real step, compiled for a slice that is not here.

    python -m lowrank.plan --config=configs/llama3.py:8b --topology=v5e:2x4
    python -m lowrank.plan --config=configs/llama3.py:8b --topology=v5e:4x4 --search
    python -m lowrank.plan --config=configs/demo.py --topology=local

It needs no weights, no tokenizer and no data, only the `plan` extra (libtpu). Bytes and collectives are the compiler's; times
and dollars are estimates. Exit code 1 where the step does not fit. With `--topology=local` the step also runs, on random
weights, and the estimate is compared with the measured time.
"""

import json

from absl import flags

from lowrank.cli import config_file
from lowrank.cli import run as cli
from lowrank.config import describe_keys
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.lines import replace

flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, an ml_collections config; --config.KEY=VALUE overrides.")
flags.DEFINE_string(
    "topology", None, "The slice, as v5e:2x4 (an unknown one lists all), or local: this machine's devices."
)
flags.DEFINE_bool("search", False, "Try meshes, remat and micro-batches; the batch stays what it is.")
flags.DEFINE_integer("search_fits", 3, "With --search: compile until so many fit.", lower_bound=1)
flags.DEFINE_integer("search_most", 12, "With --search: compile no more than so many.", lower_bound=1)
flags.DEFINE_float("tokens", None, "Also say what training on so many tokens takes.", lower_bound=1)
flags.DEFINE_float("price_per_chip_hour", None, "Dollars, in place of the list price.", lower_bound=0)
flags.DEFINE_string("json", None, "Also write the plan's numbers into this file.")
flags.DEFINE_float(
    "efficiency",
    None,
    "The share of the roofline that is taken to be reached; default: as the compiler's cycles say, else 0.5.",
    0.01,
    1,
)
FLAGS = flags.FLAGS


def main(arguments: list[str]) -> int:
    import jax  # here, so that --help does not wait for it

    from lowrank import planning
    from lowrank.planning.chips import CHIPS

    config = config_file.read(FLAGS.config, arguments)
    if not FLAGS.topology:
        raise UserError(f"--topology is missing; say local, or CHIP:TOPOLOGY with one of {', '.join(CHIPS)}")
    file = paths.local(FLAGS.json) if FLAGS.json else None
    if file and not file.parent.is_dir():
        raise UserError(f"--json={file}: its folder does not exist; make it first")
    if FLAGS.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # this process computes nothing: accelerators stay free for others
    names = ("search", "search_fits", "search_most", "tokens", "price_per_chip_hour", "efficiency")
    options = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    result = planning.plan(config, FLAGS.topology, progress=True, **options)
    print(planning.describe(result))
    if file:
        replace(file, json.dumps(planning.record(result), indent=1) + "\n")
    best = result.best
    if FLAGS.topology == "local" and best.fits:
        seconds = planning.measure_seconds(best)
        print(
            f"\nmeasured   {seconds:.4g} seconds a step here, {seconds / best.roofline.seconds:.3g} times the roofline's"
        )
    return 0 if best.fits else 1


if __name__ == "__main__":
    cli.run(main, describe_keys())
