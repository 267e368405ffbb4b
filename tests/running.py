"""Commands as a user runs them: in this process (`run`, on one device, to the exit code) or in another (`start`)."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import flags

from lowrank.cli import run as cli
from lowrank.model import decoder
from lowrank.parallel import compiling, mesh
from lowrank.runs import setup, speed
from lowrank.sweeping import group, members
from lowrank.training.partition import named_leaves
from lowrank.training.step import make_eval_step

COMMANDS = ("train", "sweep", "generate", "evaluate", "convert", "export", "analyze", "plan")
ROOT = pathlib.Path(__file__).parents[1]
CACHE = {  # compiled programs that tests and commands share, in this run of the suite and in the next
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}

# A run of a few seconds over the embedded base: 60 instructions about lists of words, of which the last ten are held out.
TINY = """
import ml_collections


def get_config():
    return ml_collections.ConfigDict({
        "base": BASE,
        "data": {"train": DATA, "eval_examples": 10, "format": "completion", "max_length": 64},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "train": {"steps": 6, "batch_size": 4},
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
        "dtype": "float32",
        "param_dtype": "float32",
        "eval": {"every": 3},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
        "sample": {"every": 3, "prompts": ("Once upon a time", "Name a colour."), "max_new_tokens": 4},
    })
"""


def write_tiny(folder: pathlib.Path) -> str:
    """Write the tiny run's data and config into a folder -> its --config flag."""
    demo = ROOT / "configs" / "demo"
    records = [
        {"prompt": f"{x['instruction']} {x['input']}\n", "completion": x["output"]}
        for x in json.loads((demo / "instructions.json").read_text())
        if "\n" not in x["input"]
    ]
    (folder / "data.json").write_text(json.dumps(records[:60]))
    config = TINY.replace("BASE", repr(str(demo / "base"))).replace("DATA", repr(str(folder / "data.json")))
    (folder / "tiny.py").write_text(config)
    return f"--config={folder / 'tiny.py'}"


@functools.cache
def init(model: decoder.Decoder, seed: int = 0) -> dict:
    """`decoder.init` under jit: one program of one second instead of a hundred small ones of ten. -> NumPy arrays, so that
    no test donates those of another."""
    return jax.device_get(jax.jit(lambda key: decoder.init(model, key))(jax.random.key(seed)))


# ---- Programs ----------------------------------------------------------------------------------------------------------
# Tracing and compiling a step is most of a short run. Runs of this process whose steps are the same share one.

_shared = {}


def shared(function, key=lambda *arguments: arguments):
    """`function`, called once for each `key` of its arguments."""

    def call(*arguments):
        made = (function, key(*arguments))
        if made not in _shared:
            _shared[made] = function(*arguments)
        return _shared[made]

    return call


def forget_programs():
    _shared.clear()
    init.cache_clear()
    jax.clear_caches()


def _signature(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


def _step_key(config, architecture, mesh, steps):
    own = (config.lora, config.train, config.optim, config.dtype, config.param_dtype, config.remat, config.attention)
    return (setup.make_train_step, own, config.data.max_length, architecture, mesh, steps)


def _members_optim(config):
    """Of the optimizer, what is the same for all members; the rest is an argument of their step."""
    same = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 1.0}
    optim = dataclasses.replace(config.optim, **same)
    return (config.train.mode, config.train.microbatches, optim)


def _programs_key(made):
    own = (made.model, made.mesh, made.count, made.at_once)
    return (group.members_lib.make_members_step, _members_optim(made.config), *own)


def _members_step_key(model, config, mask, layout, at_once):
    return (model, _members_optim(config), at_once, _signature(layout))


abstract_step = shared(setup.abstract_step, _step_key)
make_members_step = shared(members.make_members_step, _members_step_key)
make_members_eval_step = shared(members.make_members_eval_step)


SHARING = {  # what stands in for what while a command runs
    "lowrank.runs.train.abstract_step": abstract_step,
    "lowrank.runs.train.make_eval_step": shared(make_eval_step),
    "lowrank.runs.speed.product_flops": shared(speed.product_flops),
    "lowrank.sweeping.group.Programs": shared(group.Programs, _programs_key),
    "lowrank.parallel.compiling.compile_for": shared(
        compiling.compile_for, lambda function, *arguments: (function, _signature(arguments))
    ),
}


# ---- Commands ----------------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def load(name: str):
    """The module of a command. absl has one table of flags for a process, and each command must find it empty."""
    defined = flags.FLAGS.flags_by_module_dict()
    for other in COMMANDS:
        for flag in [*defined.get(f"lowrank.{other}", ())]:
            delattr(flags.FLAGS, flag.name)
    flags.FLAGS["verbosity"].unparse()  # absl's own; another run may have set it
    sys.modules.pop(f"lowrank.{name}", None)
    return importlib.import_module(f"lowrank.{name}")


def run(name: str, *arguments: str, stdin: str = "", changes: dict | None = None, devices: int = 1) -> Finished:
    """Run a command in this process, through `lowrank.cli.run.run`; `changes` replaces what dotted names stand for.

    On one device, as a user's laptop has it: what eight compute is tested elsewhere, and takes them far longer.
    """
    module = load(name)
    out, err = io.StringIO(), io.StringIO()
    make_mesh = functools.partial(mesh.make_mesh, devices=jax.devices()[:devices])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [f"lowrank.{name}", *arguments]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(mock.patch.object(mesh, "make_mesh", make_mesh))
        for key, value in (SHARING | (changes or {})).items():
            place, _, attribute = key.rpartition(".")
            stack.enter_context(mock.patch.object(importlib.import_module(place), attribute, value))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = 0
        try:
            cli.run(module.main)
        except SystemExit as ended:
            code = ended.code or 0
    return Finished(code, out.getvalue(), err.getvalue())


def environment(devices: int, code: pathlib.Path = ROOT) -> dict[str, str]:
    cache = {name.upper(): str(value) for name, value in CACHE.items()}
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(code)} | cache


def start(name: str, *arguments: str, devices: int = 1, code=ROOT, **options) -> subprocess.Popen:
    """Start a command in a process of its own, with so many devices and this suite's compiled programs.

    `code`: the folder in which the package lies.
    """
    words = [sys.executable, "-m", f"lowrank.{name}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(devices, code), cwd=code, **(pipes | options))


def start_processes(
    count: int, devices: int, *arguments: str, own: dict | None = None, code=()
) -> list[subprocess.Popen]:
    """Start a training of several processes; `own` are further arguments of some of them, by number; `code` is where each
    has its package, if not here."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{probe.getsockname()[1]}"
    processes = []
    for i, folder in enumerate(code or [ROOT] * count):
        flags = (coordinator, f"--processes={count}", f"--process={i}", *(own or {}).get(i, ()))
        processes.append(start("train", *arguments, *flags, devices=devices, code=folder))
    return processes


def finish(process: subprocess.Popen, timeout: float = 120) -> Finished:
    out, err = process.communicate(timeout=timeout)
    return Finished(process.returncode, out, err)


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


TRAIN_KEYS = {f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second")}


def steps(workdir: pathlib.Path) -> list[int]:
    """Of a run's checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@contextlib.contextmanager
def largest_file(size: int):
    """A disk on which no file can be longer than `size`: to a program it looks like a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """Without the one number that is not the run's but the machine's."""
    return [
        {name: value for name, value in line.items() if name != "train/tokens_per_second"}
        for line in lines(workdir / "metrics.jsonl")
    ]


def arrays(workdir: pathlib.Path, step: int, item: str) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint's item, whole, read by Orbax without our code."""
    folder = workdir / "checkpoints" / str(step) / item
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return named_leaves(checkpointer.restore(folder, restore_args=as_numpy))


@functools.cache
def kept_arrays(workdir: pathlib.Path, step: int, item: str) -> dict[str, np.ndarray]:
    """`arrays` of a run that does not change any more."""
    return arrays(workdir, step, item)


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path, step: int = 6):
    """Bitwise: metrics, samples, adapter, optimizer state."""
    assert metrics(workdir) == metrics(other)
    samples, expected = (folder / "samples.jsonl" for folder in (workdir, other))
    assert not expected.exists() or samples.read_bytes() == expected.read_bytes()
    for item in ("adapter", "opt_state"):
        found, expected = arrays(workdir, step, item), kept_arrays(other, step, item)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].tobytes() == expected[name].tobytes(), name


def without_last_layer(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a base in the format of Hugging Face, without its last layer: another architecture."""
    shutil.copytree(base, folder, copy_function=shutil.copyfile)
    fields = json.loads((base / "config.json").read_text())
    last = fields["num_hidden_layers"] - 1
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": last}))
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f".layers.{last}." not in name}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    return folder


class Uncompiled:
    """An ordinary function where a jitted one is expected, which is going to be lowered and compiled."""

    def __init__(self, function):
        self.compile = lambda: function

    def lower(self, *_):
        return self
