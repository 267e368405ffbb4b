"""lowrank beside transformers + PEFT: the same weights, the same batch, in turns; speed, memory and share of the machine.

    python bench/against_peft.py                                   # CPU, LoRA; --mode=full, --mode=generate
    python bench/against_peft.py --shape=135m --rows=1 --length=512 --rounds=5
    python bench/against_peft.py --device=gpu --shape=1b,3b,8b [--checkpointing --remat=full]

Each side is a process of its own (`worker.py`): lowrank's with the step that `train` compiles, PyTorch's as
`peft_side.py` says. They get the same random weights and adapter (rank 16 on all seven projections, lora_B not zero,
written by transformers and PEFT, read by each through its own importer) and the same rows, and take a step each in turn,
A B A B. Nothing is timed before the losses of three steps agree, of which the later ones depend on gradient and update;
in generation, before each of lowrank's tokens has been found as likely by transformers as its own choice, within rounding.

On a CPU the run pins itself to one core and counts CPU seconds of the process, the operating system's share included; on
a GPU, seconds of the wall clock until the device is done. Compiling is not in them. Peak memory is the whole process's
(VmHWM) on a CPU, from importing over loading and compiling to the last step; on a GPU, what arrays hold at most.

The share of the ceiling is the FLOPs that a step needs (`lowrank/model/flops.py`, without what either side computes again)
over the best that either library reaches here in a product of two large square matrices of the same dtype, in the same
run. Weights are made in a temporary folder: TMPDIR says where, and 8b needs 16 GB there.
"""

import dataclasses
import os
import statistics
import tempfile
import time

import measure
from absl import app, flags
from turns import generations, needed_flops, steps
from worker import Work, Worker

from lowrank.families.config import ModelConfig
from lowrank.families.config_json import hf_config
from lowrank.model.decoder import REMAT

MODES = ("lora", "full", "generate")
SHAPES = measure.SHAPES | {"tiny": ModelConfig(256, 64, 96, 2, 4, 2, 16)}  # tiny: to try this script out
# Rows and tokens of a row on a CPU. On a GPU one row of 2048: both sides lie on the device at the same time.
BATCHES = {"15m": (8, 256), "135m": (1, 512), "1.1b": (1, 256), "tiny": (2, 64)}
DEFAULT_SHAPES = {"cpu": ["15m", "135m", "1.1b"], "gpu": ["1b", "3b", "8b"]}

flags.DEFINE_enum("mode", "lora", MODES, "Train an adapter, train everything, or generate with an adapter.")
flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where.")
flags.DEFINE_list("shape", None, f"Any of {', '.join(SHAPES)}. If not given: 15m,135m,1.1b; on a GPU 1b,3b,8b.")
flags.DEFINE_integer("rows", None, "Rows of the batch. If not given: by the shape; 1 on a GPU.")
flags.DEFINE_integer("length", None, "Tokens of a row, or of a prompt. If not given: by the shape; 2048 on a GPU.")
flags.DEFINE_integer("segments", 1, "Each row is packed from so many texts, which do not see each other.")
flags.DEFINE_float("trained", 1.0, "Share of each text's tokens that are learnt, its last ones.", 0.0, 1.0)
flags.DEFINE_integer("new_tokens", 32, "To generate.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the base and of the arithmetic.")
flags.DEFINE_float("learning_rate", None, "If not given: 1e-3, in mode full 1e-4.")
flags.DEFINE_enum("remat", None, REMAT, "What lowrank computes again. If not given: what is fastest on that device.")
flags.DEFINE_bool("checkpointing", False, "Gradient checkpointing in PyTorch.")
flags.DEFINE_enum("attention", "sdpa", ["sdpa", "eager"], "PyTorch's.")
flags.DEFINE_enum(
    "held", None, ["bfloat16", "float32"], "What PyTorch holds trained weights in. If not given: see peft_side.py."
)
flags.DEFINE_integer("rounds", 5, "Each is timed so often.")
FLAGS = flags.FLAGS

CEILING = {"cpu": (2048, 1), "gpu": (8192, 10)}  # size of the square matrices, products in a row


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one shape; of each side ("lowrank", "peft") where it is a dict."""

    shape: str
    work: Work
    seconds: dict[str, list[dict[str, float]]]  # of every round: of a "step", or of "prefill" and "decode"
    agreement: str
    first_peak: dict[str, int]  # when everything is loaded and compiled
    peak: dict[str, int]
    compiling: float | None  # CPU seconds of lowrank's step
    ceiling: dict[str, float]
    flops: float  # of a step, or of the prefill
    versions: dict[str, dict]


def work_of(shape: str, folder: str) -> Work:
    on_cpu, full, generate = FLAGS.device == "cpu", FLAGS.mode == "full", FLAGS.mode == "generate"
    rows, length = BATCHES.get(shape, (1, 2048)) if on_cpu else (1, 2048)
    held = FLAGS.held or (FLAGS.dtype if not full else "float32")
    return Work(
        folder=folder,
        mode=FLAGS.mode,
        device=FLAGS.device,
        rows=FLAGS.rows or rows,
        length=FLAGS.length or length,
        segments=1 if generate else FLAGS.segments,
        trained=FLAGS.trained,
        new_tokens=FLAGS.new_tokens,
        dtype=FLAGS.dtype,
        learning_rate=FLAGS.learning_rate or (1e-4 if full else 1e-3),
        remat=FLAGS.remat or ("dots" if on_cpu else "none"),
        checkpointing=FLAGS.checkpointing,
        held=held,
        attention=FLAGS.attention,
    )


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measured(shape: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        work = work_of(shape, folder)
        fields = hf_config(dataclasses.replace(SHAPES[shape], stored_dtype=work.dtype))
        with Worker("weights", work) as weights:
            weights("write", fields=fields)
        with Worker("lowrank", work) as lowrank, Worker("peft", work) as peft:
            sides = {"lowrank": lowrank, "peft": peft}
            take = generations if work.mode == "generate" else steps
            found = take(sides, work, FLAGS.rounds)
            peak = {name: side("peak") for name, side in sides.items()}
            size, repeats = CEILING[work.device]
            return Result(
                shape=shape,
                work=work,
                **found,
                peak=peak,
                ceiling={name: side("ceiling", size=size, repeats=repeats) for name, side in sides.items()},
                flops=needed_flops(SHAPES[shape], work),
                versions={name: side("versions") for name, side in sides.items()},
            )


# ---- What is printed -------------------------------------------------------------------------------------------------


def heads() -> list[str]:
    second, cells = seconds_word(), ["shape, tokens", ""]
    for phase in phases():
        cells += [f"{phase}: {second}s, median (least to most)", f"tokens a {second}", "speed"]
    share = "share of the ceiling" + (", prefill" if FLAGS.mode == "generate" else "")
    return [*cells, "peak MB", "of PEFT's", "before the first step", share]


def lines(result: Result) -> list[list[str]]:
    """One for each side."""
    work, peak = result.work, result.peak
    made = []
    for name in ("lowrank", "peft"):
        ours = name == "lowrank"
        cells = [f"{result.shape}, {work.rows} x {work.length}", "lowrank" if ours else label(work)]
        for phase in phases():
            taken = {side: [round_[phase] for round_ in rounds] for side, rounds in result.seconds.items()}
            count = work.rows * (work.length if phase != "decode" else work.new_tokens - 1)
            of_rounds = [theirs / own for own, theirs in zip(taken["lowrank"], taken["peft"], strict=True)]
            median = {side: statistics.median(values) for side, values in taken.items()}
            speed = f"**{median['peft'] / median['lowrank']:.2f}x** ({min(of_rounds):.2f} to {max(of_rounds):.2f})"
            cells += [measure.spread(taken[name]), f"{count / median[name]:,.1f}", speed if ours else ""]
        cells += [f"{peak[name] / 1e6:,.0f}", f"**{peak['lowrank'] / peak['peft']:.2f}x**" if ours else ""]
        first = statistics.median(round_[phases()[0]] for round_ in result.seconds[name])
        share = result.flops / first / max(result.ceiling.values())
        made.append([*cells, f"{result.first_peak[name] / 1e6:,.0f}", f"{share:.0%}"])
    return made


def phases() -> tuple[str, ...]:
    return ("prefill", "decode") if FLAGS.mode == "generate" else ("step",)


def seconds_word() -> str:
    return "CPU second" if FLAGS.device == "cpu" else "second"


def label(work: Work) -> str:
    parts = ["transformers" if work.mode == "full" else "transformers + PEFT", work.attention]
    parts += ["checkpointing"] * work.checkpointing
    parts += [f"held in {work.held}"] * (work.mode != "generate")
    return ", ".join(parts)


def remarks(results: list[Result]) -> list[str]:
    made = []
    for result in results:
        ceiling = {name: f"{value / 1e9:,.0f}" for name, value in result.ceiling.items()}
        line = f"{result.shape}: {result.agreement}; {result.flops / 1e9:,.1f} GFLOP needed; large products reach "
        line += f"{ceiling['lowrank']} GFLOP/s in JAX, {ceiling['peft']} in PyTorch; "
        line += f"lowrank's attention is {result.versions['lowrank']['attention']}"
        made.append(line + (f"; lowrank compiles for {result.compiling:.0f} CPU seconds" if result.compiling else ""))
    work, versions = results[0].work, results[0].versions
    parts = [f"mode {work.mode}", f"{work.dtype}", f"lowrank's remat {work.remat}", f"{FLAGS.rounds} rounds"]
    if work.mode != "full":
        parts.append("LoRA of rank 16 on all seven projections, not merged")
    if work.mode == "generate":
        parts.append(f"{work.new_tokens} new tokens a row, greedy")
    else:
        parts.append(f"{work.segments} text(s) a row, {work.trained:.0%} of the tokens learnt")
    made.append("; ".join(parts))
    where = f"{versions['lowrank']['device']}" + (", one pinned core" if work.device == "cpu" else "")
    made.append(
        f"{where}; {versions['lowrank']['versions']}, {versions['peft']['versions']}; {time.strftime('%Y-%m-%d')}"
    )
    return made


def main(arguments: list[str]):
    shapes = FLAGS.shape or DEFAULT_SHAPES[FLAGS.device]
    if arguments[1:] or (unknown := sorted(set(shapes) - SHAPES.keys())):
        raise app.UsageError(f"unknown: {' '.join(arguments[1:] or unknown)}; shapes are {', '.join(SHAPES)}")
    if FLAGS.device == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print_line(heads())
    print_line(["---"] * len(heads()))
    results = []
    for shape in shapes:
        results.append(measured(shape))
        for line in lines(results[-1]):
            print_line(line)
    print()
    for remark in remarks(results):
        print(f"- {remark}")


def print_line(cells: list[str]):
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
