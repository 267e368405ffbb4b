"""One side of a comparison, alone in a process: it takes orders on stdin, a line of JSON each, and answers on stdout.

So the two sides can take turns, step by step, and yet neither has the other's threads, caches or memory. `Worker` is the
handle that the comparing script holds; run as a script this file is the process itself.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

SIDES = {"weights": ("peft_side", "Weights"), "lowrank": ("lowrank_side", "Lowrank"), "peft": ("peft_side", "Peft")}


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides have to do, and how each does it. `folder` holds base/ and adapter/, which "weights" writes."""

    folder: str
    mode: str  # lora, full or generate
    device: str  # cpu or gpu
    rows: int
    length: int
    segments: int  # a row is made of so many, of equal length
    trained: float  # share of a segment's tokens that are learnt: its last ones
    new_tokens: int  # to be generated
    dtype: str
    learning_rate: float
    remat: str  # of lowrank
    checkpointing: bool  # gradient checkpointing, of PyTorch
    held: str  # dtype in which PyTorch holds what it trains
    attention: str  # of PyTorch


def batch(work: Work, vocab: int) -> dict[str, np.ndarray]:
    """[rows, length] each: random tokens, and which of them are learnt as the continuation of those before."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (work.rows, work.length), dtype=np.int32)
    size = -(-work.length // work.segments)
    place = np.arange(work.length)
    positions = place % size
    prompt = size - max(1, round(work.trained * (size - 1)))
    learnt = positions >= prompt  # never a segment's first token, which continues nothing
    return {
        "tokens": tokens,
        "positions": np.tile(positions.astype(np.int32), (work.rows, 1)),
        "segment_ids": np.tile((place // size + 1).astype(np.int32), (work.rows, 1)),
        "learnt": np.tile(learnt, (work.rows, 1)),
    }


class Worker:
    """A side at work. Calling it with an order and its arguments gives the answer; leaving the context ends it."""

    def __init__(self, side: str, work: Work):
        self.side = side
        settings = {
            # Neither may take the device's memory before it needs it: the other one has its share.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        } | ({"JAX_PLATFORMS": "cpu"} if work.device == "cpu" else {})
        root = str(pathlib.Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, __file__, side, json.dumps(dataclasses.asdict(work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings | {"PYTHONPATH": path},
        )

    def __call__(self, order: str, **arguments):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([order, arguments]) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.side} ended while it was to {order}; why, it says above")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(side, orders, answers):
    for line in orders:
        order, arguments = json.loads(line)
        print(json.dumps(getattr(side, order)(**arguments)), file=answers, flush=True)


def main(side: str, work: Work):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    module, name = SIDES[side]
    # Imported here: each side is alone with its own library.
    serve(getattr(importlib.import_module(module), name)(work), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1], Work(**json.loads(sys.argv[2])))
