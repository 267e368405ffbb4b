"""A sweep's members as ordinary workdirs: their checkpoints, and what came of them."""

import pathlib
from typing import NamedTuple

from lowrank import config as config_lib
from lowrank.adapters.lora import padding_size
from lowrank.errors import UserError
from lowrank.files.lines import read_lines
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.checkpoint import Checkpoints
from lowrank.runs.inputs import identity
from lowrank.runs.metrics import read_evaluations
from lowrank.sweeping import members as members_lib
from lowrank.sweeping.grid import Member
from lowrank.sweeping.group import Group, own_model
from lowrank.sweeping.ranking import Result
from lowrank.training import partition
from lowrank.training.optimizer import learning_rate_schedule, make_optimizer
from lowrank.training.step import State, abstract_state


class MemberCheckpoint(NamedTuple):
    """What a checkpoint of one member holds; `state` on the host, padded as in the wave."""

    step: int
    state: State
    tokens: int
    position: dict  # of the data
    eval_loss: float | None


def write_member(group: Group, member: Member, place: pathlib.Path, written: list[MemberCheckpoint]) -> dict:
    """Write a member's checkpoints, as the same run alone would have -> the last one's trained leaves, without padding.

    `written`: in the order of their steps; nothing is written of step 0.
    """
    _, shapes = own_model(group, member)
    trainable, _ = partition.split(shapes, group.mask)
    config = member.config
    optimizer = make_optimizer(config.optim, learning_rate_schedule(config.optim, group.inputs.steps), group.mask)
    wanted = abstract_state(optimizer, trainable, group.mesh)
    cut = [members_lib.cut(one.state[:3], wanted[:3]) for one in written]
    states = [State(step, trainable, opt_state, None) for step, trainable, opt_state in cut]
    with Checkpoints(place) as checkpoints:
        checkpoints.forget()  # those of a sweep that was killed here, or of a group that is trained again
        for one, state in zip(written, states, strict=True):
            if one.step > 0:
                meta = {"step": one.step, "tokens": one.tokens, "config": config_lib.to_dict(config)}
                meta |= {"identity": identity(config, group.inputs), "versions": workdir_lib.versions()}
                checkpoints.save(one.step, state, one.position, meta, one.eval_loss)
    return states[-1].trainable


def adapter_is_whole(group: Group, member: Member, place: pathlib.Path, step: int) -> bool:
    """Whether what the member trained can be read, from the checkpoint of `step` or, if it went on alone, its last one."""
    _, shapes = own_model(group, member)
    try:
        with Checkpoints(place, read_only=True) as checkpoints:
            step = max(step, checkpoints.latest() or 0)
            checkpoints.check(step)
            checkpoints.restore_adapter(step, partition.split(shapes, group.mask)[0])
    except UserError:
        return False
    return True


def member_result(
    group: Group, member: Member, place: pathlib.Path, trainable: dict, step: int, diverged: int | None
) -> Result:
    """What came of a member, from the lines in its workdir."""
    lines, config = read_lines(place / "metrics.jsonl"), member.config

    def last(name: str) -> float | None:
        return next((line[name] for line in reversed(lines) if name in line), None)

    zeros = padding_size(config.lora, group.inputs.architecture) if config.adapter else 0
    parameters = partition.count(trainable) - zeros
    return Result(
        name=member.name,
        swept=member.swept,
        mode=config.train.mode,
        trainable=parameters,
        adapter_bytes=4 * parameters,
        steps=step,
        train_loss=last("train/loss"),
        curve=tuple(read_evaluations(place).items()),
        diverged=diverged,
        exact_match=last("eval/exact_match"),
    )
