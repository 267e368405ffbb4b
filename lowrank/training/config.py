"""`OptimConfig`: the settings of the optimizer. Imported without JAX, as all that `lowrank.config` holds."""

import dataclasses
import math

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW's constants. `clip_norm` bounds the norm of the trainable gradient; 0 turns it off.

    The warm-up takes `warmup_steps`, or `warmup_ratio` of all steps (rounded up, as transformers does).
    """

    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def warmup(self, steps: int) -> int:
        """How many of so many steps are the warm-up."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * steps)
