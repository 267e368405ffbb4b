"""A base: a folder of somebody's weights, opened, checked and fingerprinted, and its way into the parameter tree.

Nothing is read before it is needed, and each device's part of a leaf is read from the files alone: the most that is
ever held beside the parameters is this host's part of one leaf. A format joins by giving a table of tensors under
Hugging Face's names.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.errors import UserError
from lowrank.model.architecture import ModelConfig, read_config
from lowrank.weights import huggingface, meta
from lowrank.weights.layout import check, layout, transpose
from lowrank.weights.tensor_file import Tensor

SAMPLES, SAMPLE_WIDTH, SMALL_BYTES = 16, 2048, 65_536


@dataclasses.dataclass(frozen=True)
class Base:
    folder: pathlib.Path
    config: ModelConfig
    params: dict  # the tree of parameters, with something to read at every leaf (a `StoredLeaf`)
    fingerprint: str  # tells whether two bases are the same weights, whatever files they lie in


def read_base(folder: str | os.PathLike) -> Base:
    """Open a base: its config and its tensors' places, checked against each other. Reads a few megabytes."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a base model")
    if (folder / meta.PARAMS).is_file() and not (folder / "config.json").is_file():
        config, tensors = meta.open_folder(folder)
    else:
        config, tensors = read_config(folder), huggingface.open_folder(folder)
    tensors = check(tensors, config, where=str(folder))
    return Base(folder, config, stored_params(tensors, config), fingerprint(tensors))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and 16 samples along each tensor's diagonal (small tensors whole).

    Fine-tuning moves nearly every weight of a tensor that it trains, so a sample of each tensor tells two models apart,
    and 13 GB of weights cost 20 MB of reading.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        for index in samples_of(tensor):
            digest.update(tensor.read(index).tobytes())
    return digest.hexdigest()[:32]


def samples_of(tensor: Tensor) -> list[tuple[slice, ...]]:
    """The parts of a tensor that are hashed: each is up to 2048 elements of one row."""
    if math.prod(tensor.shape) * tensor.dtype.itemsize <= SMALL_BYTES:
        return [tuple(slice(0, size) for size in tensor.shape)]
    widths = [1, *(min(size, SAMPLE_WIDTH) for size in tensor.shape[1:])]
    steps = [(size - width) / (SAMPLES - 1) for size, width in zip(tensor.shape, widths, strict=True)]
    return [
        tuple(slice(int(step * i), int(step * i) + width) for step, width in zip(steps, widths, strict=True))
        for i in range(SAMPLES)
    ]


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of `params` that still lies in the files: one tensor, or the tensors of all layers, stacked."""

    tensors: tuple[Tensor, ...]
    stacked: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        inner = self.tensors[0].shape
        inner = inner[::-1] if self.transposed else inner
        return (len(self.tensors), *inner) if self.stacked else inner

    @property
    def dtype(self) -> np.dtype:
        return jnp.result_type(*(tensor.dtype for tensor in self.tensors))

    def __getitem__(self, layer: int) -> np.ndarray:
        """One layer of a stacked leaf, as it is stored."""
        return self.read((slice(layer, layer + 1), *(slice(None),) * (len(self.shape) - 1)), self.dtype)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape), dtype or self.dtype)

    def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part at `index` (a slice for every axis), in `dtype`; only that part of the files is touched."""
        spans = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)]
        out = np.empty([span.stop - span.start for span in spans], dtype)
        if self.stacked:
            for place, tensor in zip(out, self.tensors[spans[0]], strict=True):
                self._fill(place, tensor, spans[1:])
        else:
            self._fill(out, self.tensors[0], spans)
        return out

    def _fill(self, out: np.ndarray, tensor: Tensor, spans: list[slice]) -> None:
        if not self.transposed:
            out[...] = tensor.read(tuple(spans))
        else:
            transpose(tensor.read(tuple(reversed(spans))), out)


def stored_params(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict:
    """The `params` tree with a `StoredLeaf` at every leaf, from tensors by Hugging Face's names."""
    tree: dict = {}
    for path, (name, _) in layout(config).items():
        stacked = "{}" in name
        of_layers = tuple(tensors[name.format(i)] for i in range(config.layers if stacked else 1))
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = StoredLeaf(of_layers, stacked, transposed=last == "kernel")
    return tree


def load_params(base: Base, abstract: dict) -> dict:
    """The `params` tree in the dtypes and shardings (if any) that `abstract`, a tree of jax.ShapeDtypeStructs, says."""

    def load(leaf: StoredLeaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape != wanted.shape:
            raise ValueError(f"a leaf of shape {wanted.shape} is wanted, the config makes it {leaf.shape}")
        if wanted.sharding is None:
            return jax.device_put(np.asarray(leaf, wanted.dtype))
        return jax.make_array_from_callback(
            wanted.shape, wanted.sharding, lambda index: leaf.read(index, wanted.dtype), dtype=wanted.dtype
        )

    return jax.tree.map(load, base.params, abstract)
