"""A sweep's grid: `config.sweep` mirrors the config, with a tuple of values where the config has one; members are the product.

Members that can share one compiled step form a group: they differ only in the adapter's numbers, the optimizer's numbers
and the seed. Any other difference (targets, data, base, mode, …) makes another group.
"""

import dataclasses
import hashlib
import itertools
import operator
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import ml_collections
import numpy as np

from lowrank import config as config_lib
from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.cli import config_file
from lowrank.config import Config, Unparsed
from lowrank.errors import UserError
from lowrank.families.config import ATTENTION, MLP
from lowrank.training.optimizer import OptimConfig

# Logging, evaluation data and devices belong to the sweep, not to a member.
NOT_SWEPT = ("eval.", "data.eval", "checkpoint.", "log.", "sample.", "mesh.")
MAX_NAME_BYTES = 150  # a folder's name may have 255
CHOSEN_OR_MORE = config_lib.must_be("0 (chosen) or more", lambda size: size >= 0)


@dataclasses.dataclass(frozen=True)
class Member:
    """One combination. `swept`: full key -> value, without the keys that have no effect on it."""

    name: str
    swept: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """`group_size`: members in one compiled step; `at_once`: how many of these a device runs through the model together.
    0: chosen from the memory available."""

    group_size: Annotated[int, CHOSEN_OR_MORE] = 0
    at_once: Annotated[int, CHOSEN_OR_MORE] = 0


@dataclasses.dataclass(frozen=True)
class Grid:
    sweep: SweepConfig
    keys: tuple[str, ...]  # swept, in the config's order
    members: tuple[Member, ...]
    repeated: int  # combinations that are the same run as another member


def read(path: str | None, overrides: list[str]) -> Grid:
    """`FILE[:ARG]` and the arguments left on the command line -> the grid. UserError lists all offenders."""
    return make_grid(config_file.read_values(path, overrides))


def make_grid(values: Mapping | ml_collections.ConfigDict) -> Grid:
    """A config's nested values, with `sweep` among them -> the grid. UserError lists all offenders."""
    values = config_lib.plain(values)
    swept = values.pop("sweep", None) or {}
    if not isinstance(swept, dict):
        raise UserError(f"config.sweep={swept} holds keys, not a value: write config.sweep.lora.rank = (1, 4, 16)")
    errors: list[str] = []
    sizes = {name: swept.pop(name) for name in ("group_size", "at_once") if name in swept}
    sweep = config_lib.build(SweepConfig, sizes, "sweep.", errors)
    errors += config_lib.wrong_values(sweep, "sweep.")
    axes = _parse_axes(swept, errors)
    if not axes and not errors:
        errors.append("config.sweep is empty; name what to try, --config.sweep.lora.rank='(1,4,16)'")
    if errors:
        raise UserError("; ".join(errors))
    members, repeated = _make_members(values, axes)
    return Grid(sweep, tuple(axes), members, repeated)


def group_members(members: tuple[Member, ...]) -> list[list[Member]]:
    """Members that can share a compiled step, in the order of the grid."""
    found: dict[Config, list[Member]] = {}
    for member in members:
        # Defaults stand for all that members of a group may differ in.
        config = member.config
        optim = OptimConfig(b1=config.optim.b1, b2=config.optim.b2, eps=config.optim.eps)
        lora = LoraConfig(targets=tuple(sorted(config.lora.targets))) if config.adapter else LoraConfig()
        shared = dataclasses.replace(config, lora=lora, optim=optim, seed=0)
        found.setdefault(shared, []).append(member)
    return list(found.values())


def _parse_axes(swept: dict[str, Any], errors: list[str]) -> dict[str, list]:
    """Key -> the values to try, not yet of the key's type; in the config's order."""
    keys = config_lib.all_keys()
    found = {}
    for key, values in _iterate_leaves(swept, "", set(keys)):
        name = f"config.sweep.{key}"
        if key not in keys:
            errors.append(f"{name} is no config key{config_lib.did_you_mean(key, 'config.sweep.')}")
            continue
        if key.startswith(NOT_SWEPT):
            errors.append(f"{name} cannot be swept: it has to be the same for all members; set config.{key}")
            continue
        if isinstance(values, Unparsed):
            # `(linear,cosine)` is no Python literal: split it here, and let each part be parsed as the key's type.
            literal = config_lib.literal(values)
            inner = values.strip().removeprefix("(").removesuffix(")")
            values = [Unparsed(part.strip()) for part in inner.split(",") if part] if literal == values else literal
        values = list(values) if isinstance(values, (tuple, list, range)) else [values]
        if not values:
            errors.append(f"{name} is empty; give it values, or leave it out")
        found[key] = [value.item() if isinstance(value, np.generic) else value for value in values]
    return {key: found[key] for key in keys if key in found}


def _iterate_leaves(node: dict[str, Any], prefix: str, keys: set[str]) -> Iterator[tuple[str, Any]]:
    """(key, values) of nested dicts; a dict that stands where the config has a value is a value."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys:
            yield from _iterate_leaves(value, f"{key}.", keys)
        else:
            yield key, value


def _make_members(values: dict[str, Any], axes: dict[str, list]) -> tuple[tuple[Member, ...], int]:
    """The product of the axes, and how many combinations repeat a member. UserError lists each offender once."""
    errors: dict[str, None] = {}
    members: dict[str, Member] = {}
    repeated = 0
    first_seed = None
    for combination in itertools.product(*axes.values()):
        own = config_lib.plain(values)
        try:
            for key, value in zip(axes, combination, strict=True):
                config_lib.set_key(own, key, value)
            config = config_lib.from_values(own)
        except UserError as error:
            errors |= dict.fromkeys(str(error).split("; "))
            continue
        if first_seed is None:
            first_seed = config.seed
        if config.data.seed is None:  # all members read the data in one order: that of the first seed
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=first_seed))
        without_effect: tuple[str, ...] = ()
        if config.train.mode == "full":  # no adapter, and the seed draws nothing where a base is loaded
            without_effect = ("lora.", "seed") if config.base else ("lora.",)
        swept = {key: operator.attrgetter(key)(config) for key in axes if not key.startswith(without_effect)}
        if "lora.targets" in swept:  # a set: the order in which targets are named has no effect
            swept["lora.targets"] = tuple(sorted(swept["lora.targets"], key=TARGETS.index))
        name = _make_name(swept)
        twice = f"config.sweep makes two members of the name {name}"
        if name not in members:
            members[name] = Member(name, swept, config)
        elif swept != members[name].swept:
            errors[f"{twice}, of values that look alike; change one of them"] = None
        elif not without_effect:
            errors[f"{twice}; give each value once"] = None
        else:
            repeated += 1
    if errors:
        raise UserError("; ".join(errors))
    return tuple(members.values()), repeated


def _make_name(swept: dict[str, Any]) -> str:
    """`rank=4,learning_rate=0.001,seed=0`: the last part of each key, or the whole key where two have the same last part."""
    lasts = [key.split(".")[-1] for key in swept]
    parts = [
        f"{key if lasts.count(last) > 1 else last}={name_value(value)}"
        for (key, value), last in zip(swept.items(), lasts, strict=True)
    ]
    name = re.sub(r"[^A-Za-z0-9._+=,-]", "_", ",".join(parts)) or "one"
    if len(name) <= MAX_NAME_BYTES:
        return name
    return f"{name[: MAX_NAME_BYTES - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def name_value(value: Any) -> str:
    """A swept value as it stands in a member's name."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, str) and "/" in value:
        return pathlib.PurePath(value).name
    if isinstance(value, tuple):
        target_sets = {ATTENTION: "attention", MLP: "mlp", TARGETS: "all"}
        return target_sets.get(value) or "+".join(name_value(part) for part in value) or "none"
    return "none" if value is None else str(value)
