"""A sweep's grid: `config.sweep` mirrors the config, with a tuple of values where the config has one; members are the product.

Members that differ only in what the members of one compiled step may differ in form a group: numbers of the adapter, the
optimizer's numbers, the seed. Whatever else differs (targets, data, base, mode …) makes further groups.
"""

import copy
import dataclasses
import hashlib
import itertools
import pathlib
import re

import numpy as np

from lowrank import config as config_lib
from lowrank.adapters.lora import TARGETS, LoraConfig
from lowrank.cli import config_file
from lowrank.config import Config, Unparsed
from lowrank.errors import UserError
from lowrank.families.config import ATTENTION, MLP
from lowrank.training.optimizer import OptimConfig

# How a run is watched, what it is measured by, and where it runs: that is the sweep's, not a member's.
NOT_SWEPT = ("eval.", "data.eval", "checkpoint.", "log.", "sample.", "mesh.")
LONGEST = 150  # bytes of a name; folders may have 255
# Of optim, what the members of a group have in common; the rest may differ.
COMMON = ("b1", "b2", "eps")


@dataclasses.dataclass(frozen=True)
class Member:
    """One combination. `swept`: full key -> value, without the keys that mean nothing for it."""

    name: str
    swept: dict[str, object]
    config: Config


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """How the sweep trains. `group_size`: members in one compiled step; `at_once`: of these, how many a device has in
    the model at one time. 0: chosen from the memory at hand."""

    group_size: int = 0
    at_once: int = 0


@dataclasses.dataclass(frozen=True)
class Grid:
    sweep: SweepConfig
    keys: tuple[str, ...]  # swept, in the config's order
    members: tuple[Member, ...]
    repeated: int  # combinations that are the same run as another member


def read(path: str | None, overrides: list[str]) -> Grid:
    """`FILE[:ARG]` and the arguments left on the command line -> the grid. Raises UserError with all offenders."""
    values = config_file.read_values(path, overrides)
    swept = values.pop("sweep", None) or {}
    if not isinstance(swept, dict):
        raise UserError(f"config.sweep={swept} holds keys, not a value: write config.sweep.lora.rank = (1, 4, 16)")
    errors: list[str] = []
    own = {name: swept.pop(name) for name in ("group_size", "at_once") if name in swept}
    sweep = config_lib.build(SweepConfig, own, "sweep.", errors)
    errors += [
        f"config.sweep.{name}={size} must be 0 (chosen) or more" for name, size in vars(sweep).items() if size < 0
    ]
    axes = _axes(swept, errors)
    if not axes and not errors:
        errors.append("config.sweep is empty; name what to try, --config.sweep.lora.rank='(1,4,16)'")
    if errors:
        raise UserError("; ".join(errors))
    members, repeated = _members(values, axes)
    return Grid(sweep, tuple(axes), members, repeated)


def groups(members: tuple[Member, ...]) -> list[list[Member]]:
    """Members by what they have in common, in the order of the grid."""
    found: dict[Config, list[Member]] = {}
    for member in members:
        found.setdefault(shared_part(member.config), []).append(member)
    return list(found.values())


def shared_part(config: Config) -> Config:
    """The config without what the members of a group may differ in."""
    optim = dataclasses.replace(OptimConfig(), **{name: getattr(config.optim, name) for name in COMMON})
    lora = LoraConfig(targets=tuple(sorted(config.lora.targets))) if config.adapter else LoraConfig()
    return dataclasses.replace(config, lora=lora, optim=optim, seed=0)


def _axes(swept: dict, errors: list[str]) -> dict[str, list]:
    """Key -> the values to try, not yet of the key's type; in the config's order."""
    keys = config_lib.all_keys()
    found = {}
    for key, values in _leaves(swept, "", set(keys)):
        name = f"config.sweep.{key}"
        if key not in keys:
            errors.append(f"{name} is no config key{config_lib.did_you_mean(key, 'config.sweep.')}")
            continue
        if key.startswith(NOT_SWEPT):
            errors.append(f"{name} cannot be swept: it has to be the same for all members; set config.{key}")
            continue
        if isinstance(values, Unparsed):
            # A text in brackets or with commas is a tuple; one string, of a key that holds strings, is one value.
            literal = config_lib.literal(values)
            inner = values.strip().removeprefix("(").removesuffix(")")
            values = [Unparsed(part.strip()) for part in inner.split(",") if part] if literal == values else literal
        values = list(values) if isinstance(values, (tuple, list, range)) else [values]
        values = [one.item() if isinstance(one, np.generic) else one for one in values]
        if not values:
            errors.append(f"{name} is empty; give it values, or leave it out")
        found[key] = values
    return {key: found[key] for key in keys if key in found}


def _leaves(node: dict, prefix: str, keys: set[str]):
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys:
            yield from _leaves(value, f"{key}.", keys)
        else:
            yield key, value


def _members(values: dict, axes: dict[str, list]) -> tuple[tuple[Member, ...], int]:
    """The product of the axes. Raises UserError with all that is wrong in any of the configs, each once."""
    errors: dict[str, None] = {}
    members: dict[str, Member] = {}
    repeated = 0
    first_seed = None
    for combination in itertools.product(*axes.values()):
        own = copy.deepcopy(values)
        for key, value in zip(axes, combination, strict=True):
            *parents, leaf = key.split(".")
            node = own
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        try:
            config = config_lib.from_values(own)
        except UserError as error:
            errors |= dict.fromkeys(str(error).split("; "))
            continue
        if first_seed is None:
            first_seed = config.seed
        if config.data.seed is None:  # the order of the data is one for all members: that of the first seed
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=first_seed))
        idle = ()
        if config.train.mode == "full":  # no adapter, and no random numbers where there is a base
            idle = ("lora.", "seed") if config.base else ("lora.",)
        swept = {key: config_lib.value(config, key) for key in axes if not key.startswith(idle or ("-",))}
        if "lora.targets" in swept:  # their order means nothing
            swept["lora.targets"] = tuple(sorted(swept["lora.targets"], key=TARGETS.index))
        name = _name(swept)
        if name not in members:
            members[name] = Member(name, swept, config)
        elif swept != members[name].swept:
            errors[
                f"config.sweep makes two members of the name {name}, of values that look alike; change one of them"
            ] = None
        elif not idle:
            errors[f"config.sweep makes two members of the name {name}; give each value once"] = None
        else:
            repeated += 1
    if errors:
        raise UserError("; ".join(errors))
    return tuple(members.values()), repeated


def _name(swept: dict[str, object]) -> str:
    """`rank=4,learning_rate=0.001,seed=0`: the last part of each key, or all of it where two have the same."""
    lasts = [key.split(".")[-1] for key in swept]
    parts = [
        f"{key if lasts.count(last) > 1 else last}={text(value)}"
        for (key, value), last in zip(swept.items(), lasts, strict=True)
    ]
    name = re.sub(r"[^A-Za-z0-9._+=,-]", "_", ",".join(parts)) or "one"
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


NAMED = {ATTENTION: "attention", MLP: "mlp", TARGETS: "all"}


def text(value) -> str:
    """A swept value for names and tables."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, str) and "/" in value:
        return pathlib.PurePath(value).name
    if value in NAMED:
        return NAMED[value]
    if isinstance(value, tuple):
        return "+".join(text(part) for part in value) or "none"
    return str(value).lower() if value is None else str(value)
