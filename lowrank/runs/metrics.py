"""What a run tells: `metrics.jsonl` always, the console, and TensorBoard or W&B if asked for.

The step's scalars stay on the device; the loop hands them over one step late, so that reading them never keeps the
next step from being dispatched. Of several processes the first one writes; in the others the same calls write nothing.
"""

import uuid

from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.lines import append_line, bucket_lines, flush_lines, replace
from lowrank.parallel import distributed


def due(step: int, every: int, last: int) -> bool:
    """At every multiple of `every` and at the last step; 0 is off."""
    return every > 0 and (step == last or step % every == 0)


class Metrics:
    """Writes the scalars of a step to every place that was asked for."""

    def __init__(self, workdir: paths.Path, config: dict, tensorboard: bool, wandb: str | None, step: int):
        """`step`: what was written after it is about to come again."""
        self.file = workdir / "metrics.jsonl"
        self.tensorboard = self.wandb = None
        if not distributed.first():
            return
        if tensorboard:
            try:
                import tensorboardX
            except ImportError:
                raise UserError("config.log.tensorboard needs tensorboardX; pip install 'lowrank[logging]'") from None
            self.tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if wandb:
            try:
                import wandb as wandb_library
            except ImportError:
                raise UserError("config.log.wandb needs wandb; pip install 'lowrank[logging]'") from None
            id_file = workdir / "wandb_id"  # the same workdir goes on in the same run
            if not id_file.exists():
                replace(id_file, uuid.uuid4().hex)
            run_id = id_file.read_text()
            place = None if paths.is_remote(workdir) else str(workdir)
            self.wandb = wandb_library.init(project=wandb, id=run_id, resume="allow", config=config, dir=place)

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
