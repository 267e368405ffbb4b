"""AdamW over the trainable leaves: `optax.partition` by the mask's labels, and the learning-rate schedule."""

import functools
import math

import optax

from lowrank.training.config import OptimConfig
from lowrank.training.partition import optimizer_labels


def learning_rate_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step (0-based) -> learning rate: linear warm-up, then the schedule, which ends at 0 at `steps`."""
    peak, warmup = config.learning_rate, config.warmup(steps)
    remaining = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining),
    }[config.schedule]
    if not warmup:
        return after
    # The first step already has peak / warmup: a warm-up from 0 wastes a step and looks like a run that does not learn.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1), after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, mask: dict, *, clip_norm=None, weight_decay=None
) -> optax.GradientTransformation:
    """The transformation of the trainable gradient (a tree with holes where the mask is off).

    The labels come from the mask, so a frozen leaf has no moments and is not decayed even in a tree without holes.
    `optax.masked` alone would pass such a leaf's raw gradient on; `chain(freeze, adamw)` would still decay it. The clip sees
    only the trainable gradient: a norm over the whole tree would compute the gradients of the base again, and clip wrongly.

    `clip_norm` and `weight_decay` replace the config's in a sweep, where they are arrays; no clipping is then infinity.
    """
    clip_norm = config.clip_norm or math.inf if clip_norm is None else clip_norm
    weight_decay = config.weight_decay if weight_decay is None else weight_decay

    adamw = functools.partial(optax.adamw, schedule, config.b1, config.b2, config.eps)
    decayed, undecayed = adamw(weight_decay=weight_decay), adamw(weight_decay=0.0)
    groups = {"decayed": decayed, "undecayed": undecayed, "frozen": optax.set_to_zero()}
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.partition(groups, optimizer_labels(mask)))
