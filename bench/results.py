"""The CPU part of the side-by-side measurements, one after another, into bench/RESULTS.md; with what each command was.

    python bench/results.py [--to=FILE] [--only=WORD]     # --only: the commands that have this word in them

The file is written anew after each command, so a run that is stopped leaves what it has found. Left out: what needs a
GPU (`against_peft.py --device=gpu`).
"""

import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time

import measure
from absl import app, flags

flags.DEFINE_string("to", str(pathlib.Path(__file__).with_name("RESULTS.md")), "The file to write.")
flags.DEFINE_string("only", "", "Run the commands that have this word in them.")
FLAGS = flags.FLAGS

# Full fine-tuning of 1.1b would need 18 GB a side. FOLDER is a temporary one.
SECTIONS = {
    "LoRA beside transformers + PEFT": "bench/against_peft.py --rounds=5",
    "Full fine-tuning beside transformers": "bench/against_peft.py --mode=full --shape=15m,135m --rounds=3",
    "Generation beside transformers + PEFT": "bench/against_peft.py --mode=generate --rounds=3",
    "A sweep's step beside its members' one by one": "bench/sweep.py",
    "Memory and time by remat, micro-batches and chunk": "bench/memory.py",
    "Gradients in bfloat16": "bench/gradients.py",
    "Attention": "bench/attention.py",
    "Importing and converting a base": "bench/import_speed.py --shape=1.1b --folder=FOLDER",
}


def main(arguments: list[str]):
    if arguments[1:]:
        raise app.UsageError(f"unknown arguments {' '.join(arguments[1:])}")
    began = time.monotonic()
    root = pathlib.Path(__file__).parents[1]
    scratch = root / "runs"  # on the disk, where a temporary folder may be in memory
    scratch.mkdir(exist_ok=True)
    text = f"""# What was measured

By `python bench/results.py{"".join(f" {word}" for word in sys.argv[1:])}` (which `make bench` runs) on {time.strftime("%Y-%m-%d")},
{measure.processor()} with {measure.cores()} core(s), Python {platform.python_version()}, commit {commit(root)}. What each number is, the
docstring of its script says. Anyone can run it.
"""
    for title, command in SECTIONS.items():
        if FLAGS.only not in command:
            continue
        print(f"python {command}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            words = shlex.split(command.replace("FOLDER", folder))
            done = subprocess.run([sys.executable, *words], cwd=root, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        print(done.stdout)
        minutes = (time.monotonic() - start) / 60
        text += f"\n## {title}\n\n`python {command}` ({minutes:.0f} minutes)\n\n{shown(done.stdout)}\n"
        pathlib.Path(FLAGS.to).write_text(text, encoding="utf-8")
    print(f"{FLAGS.to}, {(time.monotonic() - began) / 60:.0f} minutes")


def shown(output: str) -> str:
    """A table as it is; anything else word for word."""
    output = output.strip("\n")
    return output if output.startswith("|") else f"```\n{output}\n```"


def commit(root: pathlib.Path) -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    app.run(main)
