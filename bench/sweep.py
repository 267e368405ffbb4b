"""A sweep's step beside the steps of its members run one by one: cost, compiling, and peak memory.

    taskset -c 0 python bench/sweep.py [--shape=15m] [--members=8] [--rows=2] [--length=256] [--dtype=bfloat16]
    python bench/sweep.py                                          # on a GPU: 1.1B, 1 row of 512
    python bench/sweep.py --rank=1,2,4,8,16,32,64,64 --at_once=4    # a rank for each member; four at once in the model

Random weights, a random packed batch whose tokens are all trained, adapters of different seeds with a lora_b that is
not zero, on one device. The steps are those that `train` and `sweep` compile. "One by one" is a step of each member
alone, in turn, over one base; members of the same rank share one compiled program, as their shapes agree. The two
take turns, A B A B, on a CPU in CPU seconds of the process, elsewhere in seconds of the wall clock until the device is
done. The operating system's share of CPU seconds is shown beside them, as each call of a program may fault its
temporaries in anew. Before that both take two steps, and if a member's loss differs between them nothing is printed
but that.

Compiling (with JAX's cache of compiled programs off) and peak memory are measured in processes of their own: one run
(of the widest member), the sweep, and one that stops when base and batch are there. On a CPU memory is all that the
process holds (VmHWM: ru_maxrss, but without what a process inherits of it from the one that started it), elsewhere
the device's peak_bytes_in_use. MB are 10^6 bytes.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import jax
import measure
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.adapters.config import LoraConfig
from lowrank.config import DTYPES, Config, DataConfig, TrainConfig
from lowrank.data.batch import Batch, to_devices
from lowrank.model.decoder import REMAT
from lowrank.parallel import compiling as compiling_lib
from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.runs.inputs import RunInputs, initial_variables
from lowrank.runs.setup import abstract_step
from lowrank.sweeping import group as group_lib
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member, SweepConfig
from lowrank.sweeping.group import Group, Programs
from lowrank.training import partition
from lowrank.training.step import State, init_state

SHAPES = {name: measure.SHAPES[name] for name in ("15m", "135m", "1.1b")}
flags.DEFINE_enum("shape", None, list(SHAPES), "The base. If not given: 15m on a CPU, 1.1b elsewhere.")
flags.DEFINE_integer("members", 8, "Members of the sweep.")
flags.DEFINE_integer("rows", None, "Rows of the batch. If not given: 2 on a CPU, 1 elsewhere.")
flags.DEFINE_integer("length", None, "Tokens of a row. If not given: 256 on a CPU, 512 elsewhere.")
flags.DEFINE_list("rank", ["16"], "Of all members, or one for each.")
flags.DEFINE_integer("at_once", 0, "Members in the model at one time; 0: as the sweep would choose.")
flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "In which the base is held and everything is computed.")
flags.DEFINE_enum("remat", "none", REMAT, "What the backward pass computes again.")
flags.DEFINE_integer("rounds", 5, "Each of the two is timed so often.")
flags.DEFINE_enum(
    "only", None, ["steps", "base", "one", "sweep"], "Measure this, in this process (what this script starts)."
)
FLAGS = flags.FLAGS

TOLERANCE = {"bfloat16": 1e-3, "float32": 1e-5}  # of a loss, relative
COMPARED = 2  # first steps whose losses must agree: the second one's depend on the first one's update
STEPS_FOR_MEMORY = 3


# ---- What is measured ------------------------------------------------------------------------------------------------


def make_group() -> Group:
    """The sweep's group, as `group.plan` makes it of configs that name a base and data."""
    on_cpu = jax.default_backend() == "cpu"
    architecture = SHAPES[FLAGS.shape or ("15m" if on_cpu else "1.1b")]
    rows, length = FLAGS.rows or (2 if on_cpu else 1), FLAGS.length or (256 if on_cpu else 512)
    steps = COMPARED + max(FLAGS.rounds, STEPS_FOR_MEMORY)
    members = tuple(
        Member(
            name=f"{i}",
            swept={"lora.rank": rank, "seed": i},
            config=Config(
                data=DataConfig(max_length=length),
                lora=LoraConfig(rank=rank),
                train=TrainConfig(steps=steps, batch_size=rows),
                dtype=FLAGS.dtype,
                param_dtype=FLAGS.dtype,
                remat=FLAGS.remat,
                seed=i,
            ),
        )
        for i, rank in enumerate(ranks())
    )
    config = members[0].config
    mesh = mesh_lib.members_mesh(mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1]))
    widest = members_lib.widest([member.config.lora for member in members])
    model, shapes = group_lib.model_of(config, architecture, widest, mesh)
    inputs = RunInputs(None, architecture, None, None, None, rows, 1.0, steps)
    mask = partition.trainable_mask(shapes, config.train.mode)
    count = len(members)
    group = Group(members, inputs, mesh, model, shapes, mask, count, 1)
    # The size is given, as what is compared is one step of all members: a sweep may have to part them.
    _, at_once = group_lib.choose_sizes(
        group, SweepConfig(count, FLAGS.at_once), memory.free_bytes(mesh), mesh.devices.flat[0].platform
    )
    group = dataclasses.replace(group, at_once=at_once)
    if group.count != count:
        raise app.UsageError(f"--at_once={at_once} does not divide --members={count}")
    return group


def ranks() -> list[int]:
    found = [int(rank) for rank in FLAGS.rank]
    found = found * FLAGS.members if len(found) == 1 else found
    if len(found) != FLAGS.members:
        raise app.UsageError(f"--rank has {len(found)} ranks for --members={FLAGS.members}")
    return found


def random_batch(group: Group) -> dict:
    """Rows of several segments each, all tokens trained."""
    vocab, rng = group.inputs.architecture.vocab, np.random.default_rng(0)
    rows, length = group.config.train.batch_size, group.config.data.max_length
    segment_ids, positions = np.ones((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        starts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for start in starts:
            segment_ids[row, start:] += 1
        positions[row] = np.arange(length) - np.concatenate([[0], starts])[segment_ids[row] - 1]
    batch = Batch(
        inputs=rng.integers(0, vocab, (rows, length), dtype=np.int32),
        targets=rng.integers(0, vocab, (rows, length), dtype=np.int32),
        positions=positions,
        segment_ids=segment_ids,
        loss_mask=np.ones((rows, length), bool),
    )
    return to_devices(batch, group.mesh)


def random_base(group: Group) -> dict:
    """The frozen tree of every member."""
    variables = initial_variables(group.config, group.model, None, group.shapes, {"params"})
    return jax.block_until_ready(partition.split(variables, group.mask)[1])


def members_state(group: Group, programs: Programs) -> State:
    """The stacked state before step 1, but with a lora_b that is not zero, so that members' first losses differ."""
    state = group_lib.initial_state(group, programs, group.members)
    rng = np.random.default_rng(1)
    of_members = np.asarray(ranks())

    def filled(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        used = np.arange(leaf.shape[-2])[:, None] < of_members[:, None, None, None]  # zero beyond a member's rank
        return jax.device_put(np.float32(0.02 * rng.standard_normal(leaf.shape, np.float32) * used), leaf.sharding)

    return state._replace(trainable=jax.tree_util.tree_map_with_path(filled, state.trainable))


def members_numbers(group: Group) -> members_lib.MemberHyperparams:
    configs = [member.config for member in group.members]
    numbers = members_lib.hyperparams_of(configs, group.inputs.steps, group.inputs.architecture.layers)
    return jax.device_put(numbers, NamedSharding(group.mesh, PartitionSpec("member")))


class Single:
    """What `train` makes of a member: its step, and the states to begin with."""

    def __init__(self, group: Group, member: Member):
        self.config = member.config
        setup = abstract_step(member.config, group.inputs.architecture, group.mesh, group.inputs.steps)
        self.model, self.shapes, self.mask = setup.model, setup.shapes, setup.mask
        self.optimizer, self.layout, self.step = setup.optimizer, setup.state, setup.function

    def first_state(self) -> State:
        made = initial_variables(self.config, self.model, None, self.shapes, {"lora"})
        trainable, _ = partition.split(made, self.mask)
        return init_state(self.optimizer, trainable, jax.random.key(self.config.seed), self.layout)

    def state_of(self, stacked: State, i: int, seed: int) -> State:
        """The state of member i, cut out of the stacked one."""
        own = members_lib.cut(jax.tree.map(lambda leaf: leaf[i], stacked.trainable), self.layout.trainable)
        own = jax.device_put(own, jax.tree.map(lambda leaf: leaf.sharding, self.layout.trainable))
        return init_state(self.optimizer, own, jax.random.key(seed), self.layout)


# ---- In a process alone ----------------------------------------------------------------------------------------------


def measure_steps(group: Group) -> dict:
    """Seconds of a step of each member alone, one after the other, and of one step of the sweep."""
    on_cpu = jax.default_backend() == "cpu"
    clock = measure.clock(on_cpu)
    # Of steps that wait in a queue a CPU may run several at a time, which then share its caches.
    after_each = jax.block_until_ready if on_cpu else lambda x: x
    frozen, batch, programs = random_base(group), random_batch(group), Programs(group)
    together, numbers = members_state(group, programs), members_numbers(group)
    made = {member.config.lora: Single(group, member) for member in group.members}
    singles = [made[member.config.lora] for member in group.members]
    alone = [single.state_of(together, i, group.members[i].config.seed) for i, single in enumerate(singles)]

    def one_by_one():
        losses = []
        for i, single in enumerate(singles):
            alone[i], metrics = after_each(single.step(alone[i], frozen, batch))
            losses.append(metrics.loss)
        jax.block_until_ready(alone)
        return losses

    def all_together(number):
        nonlocal together
        together, metrics = programs.step(together, numbers, frozen, batch, np.int32(number))
        jax.block_until_ready(together)
        return metrics.loss

    difference = 0.0
    for number in range(COMPARED):
        wanted, found = np.float64(jax.device_get(one_by_one())), np.float64(all_together(number))
        difference = max(difference, np.max(np.abs(found - wanted) / np.abs(wanted)))
        if not np.allclose(found, wanted, rtol=TOLERANCE[FLAGS.dtype], atol=0):
            sys.exit(f"the work is not the same: losses of step {number + 1} are {found} in the sweep, {wanted} alone")
        if number == 0 and len(np.unique(wanted)) < len(wanted):
            sys.exit(f"the members cannot be told apart by their first losses, {wanted}")
    seconds, system = {"one": [], "sweep": []}, {"one": [], "sweep": []}
    for number in range(COMPARED, COMPARED + FLAGS.rounds):
        for name, run in (("one", one_by_one), ("sweep", lambda number=number: all_together(number))):
            start, in_system = clock(), os.times().system
            run()
            seconds[name].append(clock() - start)
            system[name].append(os.times().system - in_system)
    return seconds | {
        "system": system,
        "difference": difference,
        "shape": next(name for name, shape in SHAPES.items() if shape == group.inputs.architecture),
        "rows": group.config.train.batch_size,
        "length": group.config.data.max_length,
        "at_once": group.at_once,
        "on_cpu": on_cpu,
        "device": f"CPU, {measure.processor()}, on {measure.cores()} core(s)"
        if on_cpu
        else jax.devices()[0].device_kind,
    }


def measure_process(group: Group) -> dict:
    """Compile, and take a few steps -> CPU seconds of compiling; bytes of the program, and of the process at its peak."""
    frozen, batch = random_base(group), random_batch(group)
    if FLAGS.only == "base":
        return {"peak": peak_bytes()}
    if FLAGS.only == "one":
        single = Single(group, group.members[int(np.argmax(ranks()))])
        step, state = single.step, single.first_state()
        rest = [(frozen, batch)] * STEPS_FOR_MEMORY
    else:
        programs = Programs(group)
        step, state, numbers = programs.jitted_step, members_state(group, programs), members_numbers(group)
        rest = [(numbers, frozen, batch, np.int32(number)) for number in range(STEPS_FOR_MEMORY)]
    jax.block_until_ready(state)
    start = time.process_time()
    compiled = compiling_lib.compiled(step, state, *rest[0])
    compiling = time.process_time() - start
    before = peak_bytes()
    for arguments in rest:
        state, metrics = jax.block_until_ready(compiled(state, *arguments))
    assert np.all(np.isfinite(metrics.loss))
    program = compiled.memory_analysis()
    return {
        "compiling": compiling,
        "before": before,
        "peak": peak_bytes(),
        "arguments": program.argument_size_in_bytes,
        "temporaries": program.temp_size_in_bytes,
    }


def peak_bytes() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return measure.process_peak_bytes()


# ---- Side by side ----------------------------------------------------------------------------------------------------


def measured(what: str, **more) -> dict:
    """What this script finds in a process of its own, with the flags of this one and `more`."""
    words = [sys.executable, __file__, *sys.argv[1:], f"--only={what}", *(f"--{k}={v}" for k, v in more.items())]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def table(steps: dict, base: dict, one: list[dict], sweep: list[dict]) -> list[tuple[str, str, str, str]]:
    count, unit = FLAGS.members, "CPU seconds" if steps["on_cpu"] else "seconds"
    tokens = count * steps["rows"] * steps["length"]
    single, together = (statistics.median(steps[name]) for name in ("one", "sweep"))
    of_rounds = [b / a for a, b in zip(steps["one"], steps["sweep"], strict=True)]
    compiling = {name: [run["compiling"] for run in runs] for name, runs in (("one", one), ("sweep", sweep))}
    once, all_once = (statistics.median(compiling[name]) for name in ("one", "sweep"))

    def in_bytes(what: str, key: str) -> tuple[str, str, str, str]:
        a, b = (statistics.median(run[key] for run in runs) for runs in (one, sweep))
        return what, f"one run {a / 1e6:.0f} MB", f"{b / 1e6:.0f} MB", f"{b / a:.2f}"

    widths = sorted(set(ranks()))
    in_system = {name: statistics.median(steps["system"][name]) for name in ("one", "sweep")}
    rows = [
        (
            f"{count} members' step, {unit}, median of {FLAGS.rounds} (least to most)",
            measure.spread(steps["one"]),
            measure.spread(steps["sweep"]),
            f"{together / single:.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f} of a round)",
        ),
        (
            "CPU seconds of the operating system meanwhile, median",
            f"{in_system['one']:.2f}",
            f"{in_system['sweep']:.2f}",
            f"{(together - in_system['sweep']) / (single - in_system['one']):.2f} without them" * steps["on_cpu"],
        ),
        (
            f"tokens of all members in one of these {unit}",
            f"{tokens / single:,.0f}",
            f"{tokens / together:,.0f}",
            f"{single / together:.2f}",
        ),
        (
            f"compiling the step, CPU seconds, median of {len(one)}, cache off",
            f"one run {measure.spread(compiling['one'], 1)}",
            measure.spread(compiling["sweep"], 1),
            f"{all_once / once:.2f} of one, {all_once / once / count:.2f} of {count} times one",
        ),
        in_bytes(f"peak memory of the {'process' if steps['on_cpu'] else 'device'}", "peak"),
        in_bytes("the same before the first step, after compiling", "before"),
        ("the same with base and batch only, nothing compiled", f"{base['peak'] / 1e6:.0f} MB", "", ""),
        in_bytes("the compiled step's arguments (base, state, batch)", "arguments"),
        in_bytes("the compiled step's temporaries", "temporaries"),
        (
            f"losses of the first {COMPARED} steps, largest relative difference",
            "",
            f"{steps['difference']:.1e}",
            f"at most {TOLERANCE[FLAGS.dtype]:.0e}",
        ),
        (
            "measured",
            f"{steps['shape']}, {steps['rows']} x {steps['length']} tokens, {FLAGS.dtype}, remat {FLAGS.remat}, "
            f"rank {', '.join(map(str, widths))}; {len(widths)} compiled program(s) for {count} runs",
            f"{count} members, {steps['at_once']} at once",
            "",
        ),
        ("device", steps["device"], f"jax {jax.__version__}, Python {platform.python_version()}", ""),
        ("command", f"`python bench/sweep.py{''.join(f' {word}' for word in sys.argv[1:])}`", "", ""),
    ]
    return [("", "one by one", "sweep", "ratio"), ("---",) * 4, *rows]


def main(arguments: list[str]):
    if arguments[1:]:
        raise app.UsageError(f"unknown arguments {' '.join(arguments[1:])}")
    ranks()
    logging.set_verbosity(logging.ERROR)  # JAX says which backends it did not find
    if FLAGS.only:
        jax.config.update("jax_enable_compilation_cache", False)
        group = make_group()
        with jax.set_mesh(group.mesh):
            print(json.dumps(measure_steps(group) if FLAGS.only == "steps" else measure_process(group)))
        return
    # This process leaves the device to those that it starts.
    steps = measured("steps")
    at_once = steps["at_once"]
    base, one, sweep = measured("base", at_once=at_once), [], []
    for _ in range(min(3, FLAGS.rounds)):
        one.append(measured("one", at_once=at_once))
        sweep.append(measured("sweep", at_once=at_once))
    for row in table(steps, base, one, sweep):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    app.run(main)
