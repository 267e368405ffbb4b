"""Clusters as far as they can be had here: a JobSet rendered and read, SLURM's script run over fake `srun` and `scontrol`."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SBATCH = LAUNCH / "slurm.sbatch"
MODEL = [
    "--config=configs/alpaca.py",
    "--workdir=gs://bucket/runs/alpaca",
    "--config.sample.prompts=('it\"s $one two',)",
]


def strict_yaml(text: str):
    """YAML, without keys that stand there twice, of which the first would be dropped without a word."""
    yaml = pytest.importorskip("yaml")

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = {key for key in keys if keys.count(key) > 1}
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Strict)


def render(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
    given = {"NAME": "alpaca", "TYPE": "v5litepod-16", "IMAGE": "registry/lowrank:1", **settings}
    environment = {name: value for name, value in (os.environ | given).items() if value}
    return subprocess.run([LAUNCH / "gke_jobset.sh", *arguments], env=environment, capture_output=True, text=True)


def jobset(*arguments: str, **settings: str) -> dict:
    rendered = render(*(arguments or MODEL), **settings)
    assert rendered.returncode == 0, rendered.stderr
    return strict_yaml(rendered.stdout)


def batch(tmp_path, code: int, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run the script as SLURM would, with an `srun` and an `scontrol` that write down what they are told."""
    for name, end in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\nfor word in {name} "$@"; do echo "$word" >> {tmp_path}/calls; done\n{end}\n')
        tool.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "32", **slurm, **environment}
    done = subprocess.run(["bash", SBATCH, *arguments], env=os.environ | settings, capture_output=True, text=True)
    return done, (tmp_path / "calls").read_text().splitlines()
