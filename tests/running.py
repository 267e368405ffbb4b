"""Commands as a user runs them: in this process (`run`, on one device, to the exit code) or in another (`start`)."""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from lowrank.cli import run as cli
from lowrank.parallel import mesh
from lowrank.training.partition import named_leaves

COMMANDS = ("train", "sweep", "generate", "evaluate", "convert", "export", "analyze", "plan")
ROOT = pathlib.Path(__file__).parents[1]
CACHE = {  # compiled programs that the commands share, in this run of the suite and in the next
    "jax_compilation_cache_dir": str(ROOT / ".pytest_cache" / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}

# A run of a few seconds on the real small base: 60 instructions, of which the last ten are held out.
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


def write_tiny(folder: pathlib.Path, shared_data: pathlib.Path) -> str:
    """Write the tiny run's data and config into a folder -> its --config flag."""
    alpaca = json.loads((shared_data / "alpaca" / "alpaca_9k.json").read_text())
    records = [{"prompt": f"{x['instruction']}\n", "completion": x["output"]} for x in alpaca if not x["input"]]
    short = [record for record in records if len(record["prompt"]) < 60]
    (folder / "data.json").write_text(json.dumps(short[:60]))
    base, data = repr(str(shared_data / "stories260k" / "hf")), repr(str(folder / "data.json"))
    (folder / "tiny.py").write_text(TINY.replace("BASE", base).replace("DATA", data))
    return f"--config={folder / 'tiny.py'}"


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
    """Run a command in this process, through `lowrank.command.run`; `changes` replaces names of its module.

    On one device, as a user's laptop has it: what eight compute is tested elsewhere, and takes them far longer.
    """
    module = load(name)
    out, err = io.StringIO(), io.StringIO()
    make_mesh = functools.partial(mesh.make_mesh, devices=jax.devices()[:devices])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_compile_cache())
        stack.enter_context(mock.patch.object(sys, "argv", [f"lowrank.{name}", *arguments]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(mock.patch.object(mesh, "make_mesh", make_mesh))
        for key, value in (changes or {}).items():
            stack.enter_context(mock.patch.object(module, key, value))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code = 0
        try:
            cli.run(module.main)
        except SystemExit as ended:
            code = ended.code or 0
    return Finished(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _compile_cache():
    before = {name: getattr(jax.config, name) for name in CACHE}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it asks for the folder once only

    use(CACHE)
    try:
        yield
    finally:
        use(before)


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


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path, step: int = 6):
    """Bitwise: metrics, samples, adapter, optimizer state."""
    assert metrics(workdir) == metrics(other)
    samples, expected = (folder / "samples.jsonl" for folder in (workdir, other))
    assert not expected.exists() or samples.read_bytes() == expected.read_bytes()
    for item in ("adapter", "opt_state"):
        found, expected = arrays(workdir, step, item), arrays(other, step, item)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].tobytes() == expected[name].tobytes(), name


class Uncompiled:
    """An ordinary function where a jitted one is expected, which is going to be lowered and compiled."""

    def __init__(self, function):
        self.compile = lambda: function

    def lower(self, *_):
        return self
