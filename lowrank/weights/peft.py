"""Adapters in PEFT's format, written so that every PEFT release loads them, and read back.

PEFT holds an adapter layer by layer and as torch does: `lora_A` [rank, in] and `lora_B` [out, rank] are the transposes
of our lora_a and lora_b. Left out, and refused by name: patterns of ranks, DoRA, modules saved whole, `.bin` files.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lowrank.errors import UserError
from lowrank.model.lora import TARGETS, LoraConfig
from lowrank.weights.huggingface import open_file
from lowrank.weights.layout import grouped
from lowrank.weights.new_folder import new_folder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.{layer}.{block}.{target}.lora_{factor}.weight"
KEY_PATTERN = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
BLOCKS = {target: "self_attn" if target in TARGETS[:4] else "mlp" for target in TARGETS}

# Fields that change what an adapter computes, and their supported values; any other must be off (null, false, empty).
SUPPORTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others may have changed the base too
}
HARMLESS = ("inference_mode", "revision", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size")


def write_peft(folder: str | os.PathLike, lora: dict, config: LoraConfig, *, base_name: str) -> None:
    """Write a `lora` tree as a PEFT folder, and read it back before it gets its name.

    `base_name` is what PEFT looks the base up by: a path or a name on a hub. `folder` must not exist, or be empty.
    """
    tensors = {}
    for target in config.targets:
        factors = lora["layers"][BLOCKS[target]][target]
        for letter, leaf in (("A", factors["lora_a"]), ("B", factors["lora_b"])):
            for layer, factor in enumerate(np.asarray(leaf, np.float32)):
                key = KEY.format(layer=layer, block=BLOCKS[target], target=target, factor=letter)
                tensors[key] = np.ascontiguousarray(factor.T)  # save_file does not look at strides
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.scaling == "rslora",
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        verify_peft(partial, lora, config)


def verify_peft(folder: str | os.PathLike, lora: dict, config: LoraConfig) -> None:
    """Raise unless the folder, read by our own reader, holds these very factors and settings."""
    found, found_config, _ = read_peft(folder)
    wrong = [] if found_config == dataclasses.replace(config, targets=_in_order(config.targets)) else [CONFIG]
    expected, actual = dict(_leaves(lora)), dict(_leaves(found))
    wrong += sorted(expected.keys() ^ actual.keys())
    both = expected.keys() & actual.keys()
    wrong += sorted(path for path in both if not np.array_equal(expected[path], actual[path], equal_nan=True))
    if wrong:
        raise UserError(f"{folder}: reads back other than it was written: {', '.join(wrong)}; check the disk")


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if not isinstance(node, dict):
        yield path, np.asarray(node)
        return
    for name, child in node.items():
        yield from _leaves(child, f"{path}/{name}".strip("/"))


def _in_order(targets: Iterable[str]) -> tuple[str, ...]:
    return tuple(target for target in TARGETS if target in set(targets))


def read_peft(folder: str | os.PathLike) -> tuple[dict, LoraConfig, str | None]:
    """(the `lora` tree in float32 numpy arrays, its settings, the base's name) of a PEFT folder."""
    folder = pathlib.Path(folder)
    config, base_name = _read_settings(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: has no {TENSORS}, the only supported format; save the adapter as safetensors")
    problems: list[str] = []
    tensors = open_file(folder / TENSORS, problems)
    places = {}  # (block, target, lora_a or lora_b) -> {layer: key}
    for key in tensors:
        match = KEY_PATTERN.fullmatch(key)
        if match and BLOCKS.get(match[3]) == match[2] and match[3] in config.targets:
            places.setdefault((match[2], match[3], f"lora_{match[4].lower()}"), {})[int(match[1])] = key
    known = {key for keys in places.values() for key in keys.values()}
    unknown = [key for key in tensors if key not in known]
    if unknown:
        problems.append(f"unknown: {grouped(unknown)}")
    layers = 1 + max((layer for keys in places.values() for layer in keys), default=0)
    lora: dict = {"layers": {}}
    missing = []
    for target in config.targets:
        for factor, rank_axis in (("lora_a", 0), ("lora_b", 1)):
            keys = places.get((BLOCKS[target], target, factor), {})
            wanted = KEY.format(layer="{}", block=BLOCKS[target], target=target, factor=factor[-1].upper())
            missing += [wanted.format(layer) for layer in range(layers) if layer not in keys]
            shapes = {tensors[key].shape for key in keys.values()}
            if len(shapes) > 1 or any(len(shape) != 2 or shape[rank_axis] != config.rank for shape in shapes):
                problems.append(
                    f"{wanted.format('*')}: shapes {sorted(map(list, shapes))} do not fit r = {config.rank}"
                )
            elif len(keys) == layers:
                stacked = np.stack([np.asarray(tensors[keys[layer]].whole().T, np.float32) for layer in range(layers)])
                lora["layers"].setdefault(BLOCKS[target], {}).setdefault(target, {})[factor] = stacked
    if missing:
        problems.append(f"missing: {grouped(missing)}")
    if problems:
        raise UserError(f"{folder / TENSORS}: {'; '.join(problems)}; fetch or export the adapter again")
    return lora, config, base_name


def _read_settings(path: pathlib.Path) -> tuple[LoraConfig, str | None]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = (fields.get(name) for name in ("r", "lora_alpha", "target_modules"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as PEFT's settings ({error}); give a PEFT folder") from None
    known = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "base_model_name_or_path", *HARMLESS)
    rest = {name: value for name, value in fields.items() if name not in known}
    problems = [
        f"{name} = {json.dumps(value)} is not supported"
        for name, value in rest.items()
        if (value not in SUPPORTED[name] if name in SUPPORTED else value)
    ]
    if not (type(rank) is int and rank > 0):
        problems.append(f"r = {json.dumps(rank)} is not a positive integer")
    if type(alpha) not in (int, float):
        problems.append(f"lora_alpha = {json.dumps(alpha)} is not a number")
    if not isinstance(targets, list) or not targets or set(targets) - set(TARGETS):
        problems.append(f"target_modules = {json.dumps(targets)} is not a list of {', '.join(TARGETS)}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; give an adapter that does without")
    config = LoraConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=fields.get("lora_dropout") or 0.0,
        targets=_in_order(targets),
        scaling="rslora" if fields.get("use_rslora") else "standard",
    )
    return config, fields.get("base_model_name_or_path")
