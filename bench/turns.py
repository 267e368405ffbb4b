"""Two sides in turns, after it is sure that they do the same work; and the FLOPs that the work needs.

A side is called with an order and answers, as `worker.Worker` does. Where the two do not agree the program ends and
says by how much: a time of other work is no result.
"""

import sys
from collections.abc import Callable

from worker import Work

from lowrank.adapters.config import LoraConfig
from lowrank.families.config import ModelConfig
from lowrank.model.flops import step_flops

# Of a loss, relative. In bfloat16 PyTorch's autocast, which is mode full's, keeps the residual stream in float32.
TOLERANCE = {"bfloat16": {"lora": 5e-3, "full": 1e-2}, "float32": {"lora": 1e-4, "full": 1e-4}}
REGRET = {"bfloat16": 0.2, "float32": 1e-3}  # standard deviations of the logits
COMPARED = 3


def steps(sides: dict[str, Callable], work: Work, rounds: int) -> dict:
    """-> of training: what `Result` in against_peft.py wants to know of it."""
    prepared = {name: side("prepare") for name, side in sides.items()}
    first_peak = {name: side("peak") for name, side in sides.items()}
    compared = [{name: side("step")["loss"] for name, side in sides.items()} for _ in range(COMPARED)]
    ours, theirs = ([losses[name] for losses in compared] for name in sides)
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    difference = max(differences)
    shown = f"losses {' '.join(f'{x:.4f}' for x in ours)} and {' '.join(f'{x:.4f}' for x in theirs)}"
    allowed = TOLERANCE[work.dtype][work.mode]
    if not all(found <= allowed for found in differences):  # what is not a number does not agree, and has no maximum
        sys.exit(f"the work is not the same: {shown}, {difference:.1e} apart, at most {allowed:.0e} is allowed")
    if abs(theirs[0] - theirs[-1]) <= 2 * difference * abs(theirs[0]):
        sys.exit(f"{COMPARED} steps changed too little to say that updates agree: {shown}; raise --learning_rate")
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append({"step": side("step")["seconds"]})
    return {
        "seconds": seconds,
        "agreement": f"{shown}, {difference:.1e} apart",
        "compiling": prepared["lowrank"]["compiling"],
        "first_peak": first_peak,
    }


def generations(sides: dict[str, Callable], work: Work, rounds: int) -> dict:
    """-> the same of generation, where each round has a prefill and a decode."""
    first_peak = {name: side("peak") for name, side in sides.items()}
    tokens = {name: side("generate")["tokens"] for name, side in sides.items()}  # compiles
    regret = sides["peft"]("regret", tokens=tokens["lowrank"])
    if not regret <= REGRET[work.dtype]:
        sys.exit(
            f"the work is not the same: of lowrank's greedy tokens one is {regret:.2f} standard deviations below what "
            f"transformers finds likeliest, at most {REGRET[work.dtype]} is allowed"
        )
    places = [a == b for rows in zip(*tokens.values(), strict=True) for a, b in zip(*rows, strict=True)]
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answer = side("generate")
            seconds[name].append({phase: answer[phase] for phase in ("prefill", "decode")})
    agreement = f"tokens at most {regret:.2f} deviations below the likeliest; {sum(places)} of {len(places)} are equal"
    return {"seconds": seconds, "agreement": agreement, "compiling": None, "first_peak": first_peak}


def needed_flops(config: ModelConfig, work: Work) -> float:
    """Of a training step, or of a forward pass over the prompts that gives each row's last token its logits."""
    full = work.mode == "full"
    parts = step_flops(config, None if full else LoraConfig(), work.rows, work.length, "none", work.mode)
    if work.mode == "generate":
        logits = 2 * config.embed * config.vocab * work.rows  # of one token of each row
        return parts.base_forward + (parts.adapter + parts.attention) / 3 + logits
    return parts.needed(work.trained)
