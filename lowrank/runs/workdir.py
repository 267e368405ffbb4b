"""A workdir: one run, one process at a time; its record `config.json`, and what may change when the run resumes."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence

import jax

from lowrank import config as config_lib
from lowrank.config import Config
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.files import bucket_lock, paths
from lowrank.files.lines import replace
from lowrank.parallel import distributed

HELD = ".lock.held"  # a file that exists while a workdir is in use, where the file system has no flock
TOKENS = ".tokens"  # the folder of the tokens of large data, beside the workdirs that use it
NFS_SECONDS = 60  # how long NFS may show a host what a folder held before another host wrote to it
PATHS = ("base", "tokenizer", "data.train", "data.eval", "data.cache", "init_adapter")
# What a resumed run may change: where files lie (their content is compared, but of evaluation data), how long it is, what and how
# often it reports, and how a step is computed, so that a run that ran out of memory can go on.
FREE_ON_RESUME = (
    *("base", "tokenizer", "data.train", "data.eval", "data.cache"),
    *("train.steps", "train.epochs", "eval.every", "eval.answers", "checkpoint.every", "checkpoint.keep"),
    *("sample.every", "sample.prompts", "sample.max_new_tokens", "log.every", "log.tensorboard", "log.wandb"),
    *(NOT_BITWISE := ("mesh.data", "mesh.fsdp", "mesh.tensor", "train.microbatches", "remat", "attention")),
)


def as_json(values):
    """Values as they come back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(values))


# Of an architecture's fields: a run older than a field has its default.
DEFAULTS = as_json(
    {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING}
)


@contextlib.contextmanager
def open_workdir(workdir: paths.Path, config: Config, identity: dict, overrides: Sequence[str], command: str):
    """Make the folder, or check that it holds this very run; while it is open, no other process trains in it."""
    file = workdir / "config.json"
    if not distributed.is_first():
        refuse_other_folder(workdir, distributed.broadcast_from_first(lambda: None))
        yield
        return
    with lock_workdir(workdir, file, "run"):
        if file.exists():
            differences = resume_differences(read_record(workdir), config, identity)
            if differences:
                raise UserError(
                    f"workdir {workdir} holds another run, which cannot go on with: {'; '.join(differences)}; "
                    "choose another --workdir, or give the run what it began with"
                )
        record = origin(command, overrides) | {"config": config_lib.to_dict(config), "identity": identity}
        replace(file, json.dumps(record, indent=1) + "\n")
        distributed.broadcast_from_first(lambda: record["at"])
        yield


def refuse_other_folder(workdir: paths.Path, at: object) -> None:
    """In another process than the first: UserError unless the workdir is process 0's, which wrote a record at time `at`."""
    for waited in range(NFS_SECONDS):
        time.sleep(min(waited, 1))
        with contextlib.suppress(UserError):
            if read_record(workdir).get("at") == at:
                return
    raise UserError(
        f"workdir {workdir} of this process is not the folder of that name of process 0; checkpoints need one that all "
        "processes see, such as one on NFS or a bucket (gs://)"
    )


def origin(command: str, overrides: Sequence[str]) -> dict:
    """What was called with which overrides, and on what it runs: for a record."""
    return {
        "at": time.time(),
        "command": command,
        "overrides": list(overrides),
        "versions": versions(),
        "git_revision": git_revision(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


@contextlib.contextmanager
def lock_workdir(workdir: paths.Path, file: paths.Path, whose: str) -> Iterator[None]:
    """Make the folder, or refuse one that is not empty and has no `file`; keep other processes out."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Checked before the lock is made, so that nothing is left in somebody else's folder.
        ours = (".lock", HELD, TOKENS, file.with_suffix(".tmp").name)
        if not file.exists() and any(path.name not in ours for path in workdir.iterdir()):
            raise UserError(
                f"workdir {workdir} is not empty and is no {whose}'s (no {file.name}); choose another --workdir"
            )
        lock: contextlib.AbstractContextManager
        if isinstance(workdir, pathlib.Path):
            lock = _lock_folder(workdir)
        else:
            workdir.check_bucket()
            lock = bucket_lock.locked(workdir / ".lock", str(workdir))
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written to ({error.strerror}); choose another --workdir"
        ) from error
    with lock:
        yield


def _lock_folder(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """Hold the lock of a folder on a disk, until what is returned is left: flock's, or where there is none a file's."""
    lock, in_use = open(workdir / ".lock", "w"), f"workdir {workdir} is in use by another process"  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        lock.close()
        raise UserError(f"{in_use}; wait for it or choose another") from None
    except OSError as error:
        lock.close()
        why = error.strerror
    held = workdir / HELD
    with contextlib.suppress(FileNotFoundError, ValueError):
        if bucket_lock.is_gone(json.loads(held.read_text(encoding="utf-8"))):
            held.unlink()
    try:
        with open(held, "x", encoding="utf-8") as file:
            json.dump(bucket_lock.this_process(), file)
    except FileExistsError:
        raise UserError(
            f"{in_use}, as {held} says; wait for it or choose another, or remove that file if no process is left"
        ) from None
    print(
        f"workdir {workdir}: its file system has no flock ({why}); while the run lasts, the file {HELD} stands for it"
    )
    stack = contextlib.ExitStack()
    stack.callback(held.unlink, missing_ok=True)
    return stack


def resume_differences(
    before: dict, config: Config, identity: dict, free=FREE_ON_RESUME, free_content=("data.eval",)
) -> list[str]:
    """How the run in a workdir differs from this one beyond the keys and the files' contents that are free to: a line each."""
    differences = []
    known = before["identity"] | {"architecture": DEFAULTS | before["identity"].get("architecture", {})}
    for name, value in as_json(identity).items():
        if known.get(name) != value and name not in free_content:
            differences.append(f"{name} has other content" if name != "base" else "base has other weights")
    changed = changed_keys(before["config"], config)
    return differences + [
        f"config.{key} was {was} and is {now}" for key, (was, now) in changed.items() if key not in free
    ]


def changed_keys(before: dict, config: Config) -> dict[str, tuple]:
    """Keys whose value is another than in the config of a record -> (what it was, what it is)."""
    # Through the config and back: keys that are newer than the run get their defaults.
    configs = (config_lib.from_values(before), config)
    was, now = (dict(config_lib.flat(as_json(config_lib.to_dict(own)))) for own in configs)
    return {key: (was[key], now[key]) for key in sorted(now) if was[key] != now[key]}


@functools.cache
def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in ("lowrank", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def code_hash() -> str:
    """Of the Python files of this package."""
    digest, package = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def git_revision() -> str | None:
    """Of the code that runs, with "+changes" if it was edited since; None outside a checkout."""
    describe = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        options = ["--exclude=*", "--dirty=+changes"]
        return subprocess.run([*describe, *options], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_record(workdir: paths.Path) -> dict:
    """What `open_workdir` wrote: command, config, identity, versions."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"workdir {workdir} does not hold a run (no config.json); name the --workdir of a training run")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["config"], record["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not the config.json of a run ({type(error).__name__}: {error})") from None
    return record


def read_config(workdir: paths.Path) -> Config:
    return config_lib.from_values(read_record(workdir)["config"])
