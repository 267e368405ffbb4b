"""Merge an adapter into its base, and write the result as a Hugging Face folder.

A merged kernel is computed in float32, one layer at a time, and rounded once. If the base is still in its files
(`Base.params`), the merged copy is the only one in memory.
"""

import dataclasses
import functools
import json
import math
import operator
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lowrank.adapters.config import LoraConfig
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.config_json import hf_config
from lowrank.families.tensor_names import hf_tensors
from lowrank.files import paths
from lowrank.files.new_folder import new_folder
from lowrank.weights import huggingface
from lowrank.weights.base import read_base
from lowrank.weights.tensor_file import in_files, transpose

SHARD_BYTES = 5 * 10**9


def merge(params: dict, lora: dict, config: LoraConfig, dtype: Any = None) -> dict:
    """The `params` tree with W + scale * lora_a @ lora_b for every kernel W [L, in, out] that has an adapter.

    Each target and layer has its own scale. Leaves may be JAX or NumPy arrays or `StoredLeaf`s; merged ones are NumPy's, in
    `dtype` (None: their own). UserError lists all that does not fit.
    """
    problems: list[str] = []
    merged = _merge(params, lora, config, dtype, "", problems)
    if problems:
        raise UserError(f"the adapter does not fit the base: {'; '.join(problems)}; give the base it was trained on")
    return merged


def _merge(node: Any, lora: Any, config: LoraConfig, dtype: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(node, dict):
        return node if dtype is None else np.asarray(node).astype(dtype)
    if "lora_a" in lora and "kernel" in node:
        kernel, lora_a, lora_b = node["kernel"], lora["lora_a"], lora["lora_b"]
        layers, rows, columns = kernel.shape
        rank = lora_a.shape[-1]
        if lora_a.shape == (layers, rows, rank) and lora_b.shape == (layers, rank, columns):
            scales = config.layer_scales(path.rpartition("/")[2], layers)
            return node | {"kernel": merged_kernel(kernel, lora_a, lora_b, scales, dtype or kernel.dtype)}
        problems.append(f"{path}: {list(lora_a.shape)} @ {list(lora_b.shape)} beside a kernel {list(kernel.shape)}")
        return node
    problems += [f"{path}/{name}".strip("/") + ": not in the base" for name in lora if type(node.get(name)) is not dict]
    return {
        name: _merge(child, lora.get(name, {}), config, dtype, f"{path}/{name}".strip("/"), problems)
        for name, child in node.items()
    }


def merged_kernel(kernel: Any, lora_a: Any, lora_b: Any, scales: Sequence[float], dtype: Any) -> np.ndarray:
    """W [L, in, out] + scales [L] * A [L, in, rank] @ B [L, rank, out], in float32, rounded once to `dtype`."""
    out = np.empty(kernel.shape, dtype)
    for layer in range(len(out)):
        a, b = (np.asarray(factor[layer]).astype(np.float32) for factor in (lora_a, lora_b))
        out[layer] = np.asarray(kernel[layer]).astype(np.float32) + np.float32(scales[layer]) * (a @ b)
    return out


def write_huggingface(
    folder: paths.PathLike, params: dict, config: ModelConfig, *, dtype: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a `params` tree as a Hugging Face folder in `dtype`, without a tokenizer. It appears after it was read back.

    `folder` must not exist, or be empty.
    """
    if len(jax.tree.leaves(params)) != len(hf_tensors(config)):
        raise ValueError("params has more or fewer leaves than its config; those would be lost")
    config = dataclasses.replace(config, stored_dtype=dtype)
    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8")
        _write_tensors(partial, params, config, shard_bytes)
        verify_huggingface(partial, params, config)


def verify_huggingface(folder: paths.PathLike, params: dict, config: ModelConfig) -> None:
    """UserError unless the folder reads back as this config and exactly these tensors in the config's dtype."""
    written = read_base(folder)
    stored, dtype = written.params, jnp.dtype(config.stored_dtype)
    wrong = [] if written.config == config else ["config.json"]
    for path, layer, *_ in _tensors(config):
        expected, found = (_part(tree, path, layer) for tree in (params, stored))
        expected = expected.astype(dtype)
        if found.dtype != dtype or found.shape != expected.shape or found.tobytes() != expected.tobytes():
            wrong.append(path if layer is None else f"{path}[{layer}]")
    if wrong:
        raise UserError(f"{folder}: reads back other than it was written: {', '.join(wrong)}; check the disk")


def _tensors(config: ModelConfig) -> Iterator[tuple[str, int | None, str, tuple[int, ...]]]:
    """(path in params, layer or None, Hugging Face's name, shape there) of every tensor of a folder."""
    for path, (name, shape) in hf_tensors(config).items():
        for layer in range(config.layers) if "{}" in name else (None,):
            yield path, layer, name.format(layer), shape


def _part(params: dict, path: str, layer: int | None) -> np.ndarray:
    """A leaf of `params`, or one layer of a stacked leaf."""
    leaf = functools.reduce(operator.getitem, path.split("/"), params)
    return np.asarray(leaf if layer is None else leaf[layer])


def _write_tensors(folder: pathlib.Path, params: dict, config: ModelConfig, shard_bytes: int) -> None:
    """One file if all fits in `shard_bytes`, else numbered files and their index."""
    dtype = jnp.dtype(config.stored_dtype)
    places = {name: (path, layer, shape) for path, layer, name, shape in _tensors(config)}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, _, shape) in places.items()}
    shards = in_files(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = huggingface.SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in shard:
            path, layer, shape = places[name]
            # New arrays in C order, because save_file writes an array's memory and ignores its strides.
            tensors[name] = np.empty(shape, dtype)
            with np.errstate(over="ignore"):  # checked below
                if path.endswith("kernel"):
                    transpose(_part(params, path, layer), tensors[name])
                else:
                    tensors[name][...] = _part(params, path, layer)
            if not np.isfinite(tensors[name]).all():
                raise UserError(f"{name}: holds infinite or undefined values in {dtype}; choose another dtype")
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / huggingface.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
