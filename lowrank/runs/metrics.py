"""A run's scalars: evaluation sums, and the writers of `metrics.jsonl` (always), TensorBoard and W&B (if asked for).

Of several processes the first one writes; in the others the same calls write nothing.
"""

import importlib
import math
import uuid
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank import config as config_lib
from lowrank.config import Config
from lowrank.data.batch import Batch, to_devices
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.lines import append_line, bucket_lines, flush_lines, read_lines, replace
from lowrank.parallel import distributed


def evaluation_sums(eval_step, batches: list[Batch], mesh: Mesh, *variables) -> tuple[np.ndarray, int]:
    """-> (float64 sum of the losses, of each member in a wave; trained tokens) over all evaluation batches."""
    total, count = np.float64(0), 0
    for batch in batches:
        with jax.set_mesh(mesh):
            loss, trained = eval_step(*variables, to_devices(batch, mesh))
        total, count = total + np.asarray(loss, np.float64), count + int(trained)
    return total, count


def evaluation_scalars(loss: float) -> dict[str, float]:
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}


def read_evaluations(workdir: paths.Path) -> dict[int, float]:
    """Step -> evaluation loss, from `metrics.jsonl`."""
    lines = read_lines(workdir / "metrics.jsonl")
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


def best_evaluation(workdir: paths.Path) -> tuple[float, int]:
    """-> (loss, step) of the best evaluation in `metrics.jsonl`; (infinity, 0) before the first one."""
    return min(((loss, step) for step, loss in read_evaluations(workdir).items()), default=(math.inf, 0))


def _library(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{key} needs {name}; pip install 'lowrank[logging]'") from None


class Metrics:
    """Writes the scalars of a step everywhere the config asks for."""

    def __init__(self, workdir: paths.Path, config: Config, step: int):
        """`step`: lines after it are about to be written again."""
        self.file = workdir / "metrics.jsonl"
        self.tensorboard = self.wandb = None
        if not distributed.is_first():
            return
        if config.log.tensorboard:
            library = _library("tensorboardX", "config.log.tensorboard")
            self.tensorboard = library.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if config.log.wandb:
            id_file = workdir / "wandb_id"  # a resumed workdir continues the same W&B run
            if not id_file.exists():
                replace(id_file, uuid.uuid4().hex)
            options = {"project": config.log.wandb, "id": id_file.read_text(), "config": config_lib.to_dict(config)}
            place = None if paths.is_remote(workdir) else str(workdir)
            self.wandb = _library("wandb", "config.log.wandb").init(**options, resume="allow", dir=place)

    def write(self, step: int, scalars: dict[str, float]):
        append_line(self.file, {"step": step, **scalars})
        if self.tensorboard:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(scalars, step=step)

    def close(self):
        flush_lines()
        bucket_lines.clear()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
