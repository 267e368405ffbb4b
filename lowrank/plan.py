"""What a training will need and cost, before a dollar is spent: its real step, compiled for a slice that is not here.

    python -m lowrank.plan --config=configs/llama3.py:8b --topology=v5e:2x4
    python -m lowrank.plan --config=configs/llama3.py:8b --topology=v5e:4x4 --search
    python -m lowrank.plan --config=configs/demo.py --topology=local

It needs no weights, no tokenizer and no data, only the `plan` extra (libtpu). Bytes and collectives are the compiler's; times
and dollars are estimates. Exit code 1 where the step does not fit. With `--topology=local` the step also runs, on random
weights, and the estimate is held against the clock.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
from absl import flags

from lowrank.cli import config_file
from lowrank.cli import run as cli
from lowrank.config import Config
from lowrank.data import packing
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.files import paths
from lowrank.files.lines import replace
from lowrank.planning import prices, topology, workload
from lowrank.planning import report as plan_report
from lowrank.planning.measure import measured_seconds, open_local
from lowrank.planning.plan import Plan, candidates, make_plan, search
from lowrank.planning.roofline import EFFICIENCY
from lowrank.planning.topology import Slice
from lowrank.planning.workload import Workload
from lowrank.runs import adapter as adapters
from lowrank.runs.inputs import check_base, check_length, named_architecture, read_data, row_shape
from lowrank.weights.base import read_base

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
flags.DEFINE_float("efficiency", EFFICIENCY, "The share of the roofline that is taken to be reached.", 0.01, 1)
FLAGS = flags.FLAGS


def main(arguments: list[str]) -> int | None:
    config = config_file.read(FLAGS.config, arguments)
    if not FLAGS.topology:
        raise UserError(f"--topology is missing; say local, or CHIP:TOPOLOGY with one of {', '.join(topology.CHIPS)}")
    architecture = architecture_of(config)
    check_length(config, architecture)
    adapters.refuse_other_layers(config.lora, architecture.layers)

    if not math.isfinite(FLAGS.tokens or 0):
        raise UserError(f"--tokens={FLAGS.tokens} must be a number of tokens, such as 1e9")
    file = paths.local(FLAGS.json) if FLAGS.json else None
    if file and not file.parent.is_dir():
        raise UserError(f"--json={file}: its folder does not exist; make it first")

    # ---- The slice. One that is not here is compiled for on the CPU.
    local = FLAGS.topology == "local"
    if local:
        slice = open_local(jnp.dtype(config.dtype))
    else:
        topology.find(FLAGS.topology)
        jax.config.update("jax_platforms", "cpu")
        slice = topology.open_slice(FLAGS.topology)

    # ---- How much there is to do, and what an hour costs.
    steps, workloads = amounts(config, architecture)
    given = FLAGS.price_per_chip_hour is not None
    price = FLAGS.price_per_chip_hour if given else prices.PER_CHIP_HOUR.get(slice.chip.name)

    # ---- The plan: compiled, or the best of several.
    if FLAGS.search:
        plan = best_of(config, architecture, slice, steps)
    else:
        plan = make_plan(config, architecture, slice, steps)
    print(plan_report.describe(plan))
    print()
    if file:
        numbers = plan_report.record(plan, workloads, FLAGS.efficiency, price)
        replace(file, json.dumps(numbers, indent=1) + "\n")
    source = "" if local and not given else plan_report.price_source(slice.chip.name, price, given)
    print(plan_report.estimate(plan, workloads, FLAGS.efficiency, price, source))
    if local and plan.fits:
        seconds = measured_seconds(plan)
        print(
            f"\nmeasured   {seconds:.4g} seconds a step here, {seconds / plan.roofline.seconds:.3g} times the roofline's"
        )
    return 0 if plan.fits else 1


def architecture_of(config: Config) -> ModelConfig:
    """Of the base, where there is one, else the one that the config names."""
    if config.base and paths.path(config.base).exists():
        architecture = read_base(config.base).config
        check_base(config, architecture)
        return architecture
    named = named_architecture(config)
    if named is None:
        raise UserError(
            f"config.base={config.base} is not here, and config.architecture names no model; "
            "say --config.architecture=llama3-8b, or another name"
        )
    return named


def amounts(config: Config, architecture: ModelConfig) -> tuple[int, list[Workload]]:
    """-> the configured run's steps, and what is to be priced: that run, if its data can be read or it says its steps, one
    epoch of Alpaca, 100M tokens, and what --tokens says."""
    round_amounts = [100e6] + ([FLAGS.tokens] if FLAGS.tokens else [])
    known = [workload.alpaca_epoch(config, architecture)]
    known += [workload.of_tokens(config, architecture, tokens) for tokens in round_amounts]
    slots = config.train.batch_size * config.data.max_length
    tokenizer = config.tokenizer or config.base
    if all(where and paths.path(where).exists() for where in (config.data.train, tokenizer)):
        train, _ = read_data(config, load_tokenizer(tokenizer))
        rows, fill = packing.packed_rows(train, **row_shape(config))
        steps = config.train.steps or math.ceil((config.train.epochs or 0) * rows / config.train.batch_size)
        name = f"the configured run over {config.data.train}"
        return steps, [Workload(name, steps * slots * fill, fill), *known]
    if config.train.steps:
        fill = known[0].fill
        name = "the configured steps, rows filled as Alpaca's"
        return config.train.steps, [Workload(name, config.train.steps * slots * fill, fill), *known]
    return 1000, known  # only the learning rates depend on it, which nothing here does


def best_of(config: Config, architecture: ModelConfig, slice: Slice, steps: int) -> Plan:
    """Search, print the ranked table, and return its first row: where nothing fits, what comes nearest."""
    count = len(candidates(config, architecture, slice))
    plans = []
    for plan in search(config, architecture, slice, steps, FLAGS.search_fits, FLAGS.search_most):
        plans.append(plan)
        print(f"compiled {len(plans)} of {count} candidates", file=sys.stderr, flush=True)
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.roofline.seconds)
    others = sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.excess)
    print(
        f"{count} candidates ranked by hand, the best {len(plans)} compiled: {len(fitting)} fit, {len(others)} do not"
    )
    print(plan_report.SEARCH_HEADING)
    for rank, plan in enumerate(fitting, 1):
        print(plan_report.search_row(plan, rank))
    for plan in others:
        print(plan_report.search_row(plan, None))
    print()
    return (fitting or others)[0]


if __name__ == "__main__":
    cli.run(main)
