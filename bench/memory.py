"""What a step needs and takes by remat, micro-batches and the loss's chunk: the table that the defaults come from.

    python bench/memory.py [--shape=15m,135m] [--rounds=3]

LoRA of rank 16 on all seven projections, bfloat16. Each line is a process of its own. Temporaries are what the compiler sets
aside beside weights, state and batch; the peak is the process's (VmHWM), from importing to the last step; CPU seconds are
those of one pinned core, compiling left out.
"""

import dataclasses
import os
import statistics
import tempfile

import measure
from absl import app, flags
from worker import Work, Worker

from lowrank.families.config_json import hf_config
from lowrank.model.decoder import REMAT
from lowrank.training.objectives.cross_entropy import CHUNK_TOKENS

flags.DEFINE_list("shape", ["15m", "135m"], "Which.")
flags.DEFINE_integer("rounds", 3, "Steps that are timed.")
FLAGS = flags.FLAGS

BATCHES = {"15m": (8, 256), "135m": (4, 512), "1.1b": (4, 256)}
MICROBATCHES = (1, 2, 4)
OTHER_CHUNKS = (256, 1024, 2048)


def lines_of(shape: str):
    """(remat, microbatches, chunk) of each line."""
    yield from ((remat, count, CHUNK_TOKENS) for remat in REMAT for count in MICROBATCHES)
    yield from (("dots", 1, chunk) for chunk in OTHER_CHUNKS if chunk <= BATCHES[shape][0] * BATCHES[shape][1])


def main(arguments: list[str]):
    if arguments[1:] or (unknown := sorted(set(FLAGS.shape) - BATCHES.keys())):
        raise app.UsageError(f"unknown: {' '.join(arguments[1:] or unknown)}; shapes are {', '.join(BATCHES)}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print("| shape, tokens | remat | micro-batches | chunk | temporaries MB | peak MB | CPU seconds a step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in FLAGS.shape:
        rows, length = BATCHES[shape]
        with tempfile.TemporaryDirectory() as folder:
            work = Work(
                folder=folder,
                mode="lora",
                device="cpu",
                rows=rows,
                length=length,
                segments=1,
                trained=1.0,
                new_tokens=0,
                dtype="bfloat16",
                learning_rate=1e-3,
                remat="none",
                checkpointing=False,
                held="bfloat16",
                attention="sdpa",
            )
            with Worker("weights", work) as weights:
                weights("write", fields=hf_config(dataclasses.replace(measure.SHAPES[shape], stored_dtype="bfloat16")))
            for remat, microbatches, chunk in lines_of(shape):
                with Worker("lowrank", dataclasses.replace(work, remat=remat)) as side:
                    side("chunk", tokens=chunk)
                    temporaries = side("prepare", microbatches=microbatches)["temporaries"]
                    side("step")
                    seconds = statistics.median(side("step")["seconds"] for _ in range(FLAGS.rounds))
                    peak = side("peak")
                cells = [f"{shape}, {rows} x {length}", remat, microbatches, chunk]
                cells += [f"{temporaries / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{seconds:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
