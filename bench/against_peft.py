"""lowrank beside transformers + PEFT: the same weights, the same batch, in turns; speed, memory and share of the machine.

    python bench/against_peft.py                                   # CPU, LoRA; --mode=full, --mode=generate
    python bench/against_peft.py --shape=135m --rows=1 --length=512 --rounds=5
    python bench/against_peft.py --device=gpu --shape=1b,3b,8b [--checkpointing --remat=full]

Each side is a process of its own (`worker.py`): lowrank's with the step that `train` compiles, PyTorch's as
`peft_side.py` says. They get the same random weights and adapter (rank 16 on all seven projections, lora_B not zero,
written by transformers and PEFT, read by each through its own importer) and the same rows, and take a step each in turn,
A B A B. Nothing is timed before the losses of three steps agree, of which the later ones depend on gradient and update;
in generation, before each of lowrank's tokens has been found as likely by transformers as its own choice, within rounding.

On a CPU the run pins itself to one core and counts CPU seconds, which include the operating system's for this process;
on a GPU, seconds of the wall clock until the device is done. Compiling is not in them. Peak memory is the whole process's
(VmHWM) on a CPU, from importing over loading and compiling to the last step; beside it the same from the first step on.
On a GPU it is what arrays hold at most.

The share of the ceiling is the FLOPs that a step needs (`lowrank/model/flops.py`, without what either side computes again)
over the best that either library reaches here in a product of two large square matrices of the same dtype, in the same
run. Weights are made in a temporary folder: TMPDIR says where, and 8b needs 16 GB there.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time

import measure
from absl import app, flags
from worker import Work, Worker

from lowrank.model.architecture import ModelConfig, hf_config
from lowrank.model.decoder import REMAT
from lowrank.model.flops import step_flops
from lowrank.model.lora import LoraConfig

MODES = ("lora", "full", "generate")
SHAPES = measure.SHAPES | {"tiny": ModelConfig(256, 64, 96, 2, 4, 2, 16)}  # tiny: to try this script out
# Rows and tokens of a row; of what the GPU's shapes are for, packed rows of 2048, one after another fits beside its rival.
BATCHES = {"15m": (8, 256), "135m": (1, 512), "1.1b": (1, 256), "tiny": (2, 64)}
DEFAULT_SHAPES = {"cpu": ["15m", "135m", "1.1b"], "gpu": ["1b", "3b", "8b"]}

flags.DEFINE_enum("mode", "lora", MODES, "Train an adapter, train everything, or generate with an adapter.")
flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where.")
flags.DEFINE_list("shape", None, f"Any of {', '.join(SHAPES)}. If not given: 15m,135m,1.1b; on a GPU 1b,3b,8b.")
flags.DEFINE_integer(
    "rows", None, "Rows of the batch. If not given: as many as the shape has in the issue it stands for."
)
flags.DEFINE_integer("length", None, "Tokens of a row, or of a prompt. If not given: by the shape; 2048 on a GPU.")
flags.DEFINE_integer("segments", 1, "Each row is packed from so many texts, which do not see each other.")
flags.DEFINE_float("trained", 1.0, "Share of each text's tokens that are learnt, its last ones.", 0.0, 1.0)
flags.DEFINE_integer("new_tokens", 32, "To generate.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the base and of the arithmetic.")
flags.DEFINE_float("learning_rate", None, "If not given: 1e-3, in mode full 1e-5.")
flags.DEFINE_enum("remat", None, REMAT, "What lowrank computes again. If not given: what is fastest on that device.")
flags.DEFINE_bool("checkpointing", False, "Gradient checkpointing in PyTorch.")
flags.DEFINE_enum(
    "held", None, ["bfloat16", "float32"], "What PyTorch holds trained weights in. If not given: see peft_side.py."
)
flags.DEFINE_integer("rounds", 5, "Each is timed so often.")
FLAGS = flags.FLAGS

TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-4}  # of a loss, relative
REGRET = {"bfloat16": 0.2, "float32": 1e-3}  # standard deviations of the logits
COMPARED = 3
CEILING = {"cpu": (2048, 1), "gpu": (8192, 10)}  # size of the square matrices, products in a row


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one shape; of each side ("lowrank", "peft") where it is a dict."""

    shape: str
    work: Work
    seconds: dict[str, list[dict[str, float]]]  # of every round: of a "step", or of "prefill" and "decode"
    agreement: str
    peak: dict[str, int]
    later_peak: dict[str, int]
    compiling: float
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
        learning_rate=FLAGS.learning_rate or (1e-5 if full else 1e-3),
        remat=FLAGS.remat or ("full" if on_cpu else "none"),
        checkpointing=FLAGS.checkpointing,
        held=held,
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
            seconds, agreement, compiling, first_peak = take(sides, work)
            later_peak = {name: side("peak") for name, side in sides.items()}
            size, repeats = CEILING[work.device]
            return Result(
                shape=shape,
                work=work,
                seconds=seconds,
                agreement=agreement,
                peak={name: max(first_peak[name], later_peak[name]) for name in sides},
                later_peak=later_peak,
                compiling=compiling,
                ceiling={name: side("ceiling", size=size, repeats=repeats) for name, side in sides.items()},
                flops=needed_flops(SHAPES[shape], work),
                versions={name: side("versions") for name, side in sides.items()},
            )


def steps(sides: dict[str, Worker], work: Work):
    """-> seconds of each round's steps, what was compared, CPU seconds of compiling, peak memory before the first step."""
    prepared = {name: side("prepare") for name, side in sides.items()}
    first_peak = {name: side("peak") for name, side in sides.items()}
    for side in sides.values():
        side("forget_peak")
    compared = [{name: side("step")["loss"] for name, side in sides.items()} for _ in range(COMPARED)]
    ours, theirs = ([losses[name] for losses in compared] for name in sides)
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    shown = f"losses {' '.join(f'{x:.4f}' for x in ours)} and {' '.join(f'{x:.4f}' for x in theirs)}"
    if not difference <= TOLERANCE[work.dtype]:  # not a number is no agreement either
        sys.exit(
            f"the work is not the same: {shown}, {difference:.1e} apart, at most {TOLERANCE[work.dtype]:.0e} is allowed"
        )
    if abs(theirs[0] - theirs[-1]) <= 2 * difference * abs(theirs[0]):
        sys.exit(f"{COMPARED} steps changed too little to say that updates agree: {shown}; raise --learning_rate")
    seconds = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
        for name, side in sides.items():
            seconds[name].append({"step": side("step")["seconds"]})
    return seconds, f"{shown}, {difference:.1e} apart", prepared["lowrank"]["compiling"], first_peak


def generations(sides: dict[str, Worker], work: Work):
    """As `steps`, of prefill and decode."""
    first_peak = {name: side("peak") for name, side in sides.items()}
    for side in sides.values():
        side("forget_peak")
    tokens = {name: side("generate")["tokens"] for name, side in sides.items()}  # compiles
    regret = sides["peft"]("regret", tokens=tokens["lowrank"])
    if not regret <= REGRET[work.dtype]:
        sys.exit(
            f"the work is not the same: of lowrank's greedy tokens one is {regret:.2f} standard deviations below what "
            f"transformers finds likeliest, at most {REGRET[work.dtype]} is allowed"
        )
    places = [a == b for rows in zip(*tokens.values(), strict=True) for a, b in zip(*rows, strict=True)]
    seconds = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
        for name, side in sides.items():
            answer = side("generate")
            seconds[name].append({phase: answer[phase] for phase in ("prefill", "decode")})
    agreement = f"tokens at most {regret:.2f} deviations below the likeliest; {sum(places)} of {len(places)} are equal"
    return seconds, agreement, 0.0, first_peak


def needed_flops(config: ModelConfig, work: Work) -> float:
    """Of a training step, or of a forward pass over the prompts that gives each row's last token its logits."""
    full = work.mode == "full"
    parts = step_flops(config, None if full else LoraConfig(), work.rows, work.length, "none", work.mode)
    logits = 2 * config.embed * config.vocab * work.rows  # of one token of each row
    if work.mode == "generate":
        return parts.base_forward + (parts.adapter + parts.attention) / 3 + logits
    # A step needs the head's logits once, whatever is computed again, and gradients by hidden states and (full) by the head.
    learnt = round(work.trained * work.length)
    return parts.base_forward + parts.base_backward + parts.adapter + parts.attention + logits * learnt * (2 + full)


# ---- What is printed -------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> list[list[str]]:
    """A line for each side of each shape."""
    training = FLAGS.mode != "generate"
    phases = ("step",) if training else ("prefill", "decode")
    second = "CPU second" if FLAGS.device == "cpu" else "second"
    heads = ["shape, tokens", ""]
    for phase in phases:
        heads += [f"{phase}: {second}s, median (least to most)", f"tokens a {second}", "speed"]
    heads += [
        "peak MB",
        "of PEFT's",
        "from the first step on",
        "of PEFT's",
        f"share of the ceiling{'' if training else ', prefill'}",
    ]
    lines = [heads, ["---"] * len(heads)]
    for result in results:
        work = result.work
        ceiling = max(result.ceiling.values())
        for name in ("lowrank", "peft"):
            ours = name == "lowrank"
            line = [f"{result.shape}, {work.rows} x {work.length}", "lowrank" if ours else label(work)]
            for phase in phases:
                taken = {side: [round_[phase] for round_ in rounds] for side, rounds in result.seconds.items()}
                count = work.rows * (work.length if phase != "decode" else work.new_tokens - 1)
                of_rounds = [theirs / own for own, theirs in zip(taken["lowrank"], taken["peft"], strict=True)]
                median = {side: statistics.median(values) for side, values in taken.items()}
                speed = f"**{median['peft'] / median['lowrank']:.2f}x** ({min(of_rounds):.2f} to {max(of_rounds):.2f})"
                line += [measure.spread(taken[name]), f"{count / median[name]:,.1f}", speed if ours else ""]
            for peak in (result.peak, result.later_peak):
                line += [f"{peak[name] / 1e6:,.0f}", f"{peak['lowrank'] / peak['peft']:.2f}x" if ours else ""]
            speed = result.flops / statistics.median(round_[phases[0]] for round_ in result.seconds[name])
            lines.append([*line, f"{speed / ceiling:.0%}"])
    return lines


def label(work: Work) -> str:
    name = "transformers" if work.mode == "full" else "transformers + PEFT"
    return (
        name
        + (", checkpointing" if work.checkpointing else "")
        + (f", held in {work.held}" if work.mode != "generate" else "")
    )


def remarks(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        ceiling = {name: f"{value / 1e9:,.0f}" for name, value in result.ceiling.items()}
        line = f"{result.shape}: {result.agreement}; {result.flops / 1e9:,.1f} GFLOP needed; large products reach "
        line += f"{ceiling['lowrank']} GFLOP/s in JAX, {ceiling['peft']} in PyTorch"
        lines.append(line + (f"; lowrank compiles for {result.compiling:.0f} CPU seconds" if result.compiling else ""))
    work, versions = results[0].work, results[0].versions
    parts = [f"mode {work.mode}", f"{work.dtype}", f"lowrank's remat {work.remat}", f"{FLAGS.rounds} rounds"]
    if work.mode != "full":
        parts.append("LoRA of rank 16 on all seven projections, not merged")
    if work.mode == "generate":
        parts.append(f"{work.new_tokens} new tokens a row, greedy")
    else:
        parts.append(f"{work.segments} text(s) a row, {work.trained:.0%} of the tokens learnt")
    lines.append("; ".join(parts))
    where = f"{versions['lowrank']['device']}" + (", one pinned core" if work.device == "cpu" else "")
    lines.append(
        f"{where}; {versions['lowrank']['versions']}, {versions['peft']['versions']}; {time.strftime('%Y-%m-%d')}"
    )
    return lines


def main(arguments: list[str]):
    shapes = FLAGS.shape or DEFAULT_SHAPES[FLAGS.device]
    if arguments[1:] or (unknown := sorted(set(shapes) - SHAPES.keys())):
        raise app.UsageError(f"unknown: {' '.join(arguments[1:] or unknown)}; shapes are {', '.join(SHAPES)}")
    if FLAGS.device == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = [measured(shape) for shape in shapes]
    for line in table(results):
        print("| " + " | ".join(line) + " |")
    print()
    for line in remarks(results):
        print(f"- {line}")


if __name__ == "__main__":
    app.run(main)
