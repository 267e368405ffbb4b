"""The import of a base beside `cat`, and its conversion beside `cp`: speed, and the memory that it takes.

    python bench/import_speed.py --shape=1.1b --folder=/tmp/import_speed                   # 2.2 GB; convert makes as much again
    python bench/import_speed.py --shape=7b --folder=/tmp/import_speed --rounds=1           # 13.5 GB
    python bench/import_speed.py --shape=1.1b --folder=/tmp/import_speed --format=native    # of the converted base

Makes a checkpoint of random weights in bfloat16, in shards of 5 GB, if the folder does not have it. Import (onto one CPU
device, in bfloat16), cat, touch (a byte of every page of as much new memory: what a virtual machine may need long for),
convert and cp take turns, each with the files out of the disk's cache at its start; cp is followed by a sync, because
convert ends with one. Memory is what the process has at its peak beyond what it had before and the finished arrays, in
sizes of the largest single tensor: all of it (VmHWM, with the pages of mapped files), and what is its own (RssAnon,
looked at every 2 ms).
"""

import dataclasses
import json
import math
import mmap
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lowrank.families.config_json import hf_config
from lowrank.families.sizes import SIZES
from lowrank.families.tensor_names import hf_tensors
from lowrank.weights import convert
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params

flags.DEFINE_enum("shape", "1.1b", ["1.1b", "7b"], "Of TinyLlama or of Llama 2 7B.")
flags.DEFINE_string("folder", None, "Where the checkpoint and its copies are made.", required=True)
flags.DEFINE_enum("format", "hf", ["hf", "native"], "What is imported and converted.")
flags.DEFINE_integer("rounds", 3, "Each is measured so often.")
flags.DEFINE_enum(
    "only", None, ["touch", "import", "convert"], "Measure one in this process, once (what this script starts)."
)
FLAGS = flags.FLAGS

FILE_BYTES = 5 * 10**9


def make_checkpoint(folder: pathlib.Path):
    config = dataclasses.replace(
        SIZES[{"1.1b": "tinyllama-1.1b", "7b": "llama2-7b"}[FLAGS.shape]], stored_dtype="bfloat16"
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(hf_config(config)))
    # A block of a length that no row divides, over and over: no two rows are the same.
    block = (0.02 * np.random.default_rng(0).standard_normal(16_777_213)).astype(jnp.bfloat16).tobytes()
    shards, size = [{}], 0
    for name, shape in hf_tensors(config).values():
        for layer in range(config.layers if "{}" in name else 1):
            nbytes = 2 * math.prod(shape)
            if size + nbytes > FILE_BYTES:
                shards, size = [*shards, {}], 0
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
            shards[-1][name.format(layer)] = entry
            size += nbytes
    weight_map = {}
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        left = max(entry["data_offsets"][1] for entry in header.values())
        with open(partial / file, "wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            while left:
                left -= stream.write(block[:left])
    (partial / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    partial.rename(folder)


def evict(folder: pathlib.Path):
    """Put a folder's files out of the disk's cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --------------------------------------------------------------------------------------------------- in a process alone


def memory() -> dict[str, int]:
    """Bytes by name, of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return {
        name: 1024 * int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines) if rest[-2:] == "kB"
    }


def measure(source: pathlib.Path, target: pathlib.Path) -> dict:
    """Import or convert once -> seconds, and bytes beyond what was there before and what is there after."""
    jnp.zeros(1).block_until_ready()  # JAX itself is no part of it
    finished = 0
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, own, done = memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            own[0] = max(own[0], memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    base = read_base(source)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), base.params)
    if FLAGS.only == "touch":
        params = np.empty(sum(leaf.size for leaf in jax.tree.leaves(wanted)), jnp.bfloat16)
        params[:: mmap.PAGESIZE // 2] = 1
        finished = params.nbytes
    elif FLAGS.only == "import":
        params = jax.block_until_ready(load_params(base, wanted))
        finished = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    else:
        convert.convert(base, target)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    peak = memory()["VmHWM"]
    largest = max(tensor.nbytes for leaf in jax.tree.leaves(base.params) for tensor in leaf.tensors)
    return {
        "wall": wall,
        "cpu": cpu,
        "largest": largest,
        "all": peak - before["VmRSS"] - finished,
        "own": own[0] - before["RssAnon"] - finished,
    }


# ------------------------------------------------------------------------------------------------------- taking turns


def main(_):
    folder = pathlib.Path(FLAGS.folder)
    hf, native, target = folder / f"{FLAGS.shape}-hf", folder / f"{FLAGS.shape}-native", folder / f"{FLAGS.shape}-new"
    source = hf if FLAGS.format == "hf" else native
    if FLAGS.only:
        print(json.dumps(measure(source, target)))
        return
    if not hf.exists():
        make_checkpoint(hf)
    if not source.exists():
        convert.convert(read_base(hf), native)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    def ours(what: str) -> dict:
        words = [
            sys.executable,
            __file__,
            f"--only={what}",
            *(f"--{n}={FLAGS[n].value}" for n in ("shape", "folder", "format")),
        ]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    def theirs(words: str) -> dict:
        before, wall = os.times(), time.perf_counter()
        subprocess.run(words, shell=True, check=True)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {"wall": time.perf_counter() - wall, "cpu": cpu}

    candidates = {
        "cat": lambda: theirs(f"cat {source}/*.safetensors > /dev/null"),
        "touch": lambda: ours("touch"),
        "import": lambda: ours("import"),
        "cp": lambda: theirs(f"cp -r {source} {target} && sync {target}/*"),
        "convert": lambda: ours("convert"),
    }
    results = {name: [] for name in candidates}
    for _ in range(FLAGS.rounds):
        for name, run in candidates.items():
            evict(source)
            results[name].append(run())
            if target.exists():
                evict(target)
                shutil.rmtree(target)
    print(f"{FLAGS.shape}, {size / 1e9:.2f} GB of bfloat16, from {FLAGS.format}, {FLAGS.rounds} rounds")
    for name, runs in results.items():
        walls = sorted(run["wall"] for run in runs)
        line = (
            f"{name:<8} {size / walls[0] / 1e6:6.0f} MB/s at best, {size / statistics.median(walls) / 1e6:6.0f} median"
        )
        line += f", {min(run['cpu'] for run in runs):6.1f} CPU seconds"
        if "all" in runs[0]:
            extra = {key: max(run[key] for run in runs) / runs[0]["largest"] for key in ("all", "own")}
            line += (
                f"; beyond the arrays {extra['all']:.2f} of the largest tensor ({runs[0]['largest'] / 1e6:.0f} MB), "
            )
            line += f"{extra['own']:.2f} its own"
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
