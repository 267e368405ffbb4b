"""Open a base: a folder of weights in any supported format, checked and fingerprinted, as a tree of leaves to read.

Weights are read when they are needed, in pieces of some megabytes (load.py puts them on the devices), and each host reads
only its own shards. A new format is a function that returns a table of tensors by Hugging Face's names.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.config_json import read_config
from lowrank.families.tensor_names import hf_tensors
from lowrank.files import hub, paths
from lowrank.files.nested import set_path
from lowrank.weights import huggingface, meta, native
from lowrank.weights.check import check
from lowrank.weights.fingerprint import fingerprint
from lowrank.weights.tensor_file import Tensor, cut, rows_within, transpose

BAND_BYTES = 2**20  # converted and transposed at once: stays in the processor's cache
WINDOW_BYTES = 2**24  # of a file, unwanted columns included, that are requested at once from a bucket


@dataclasses.dataclass(frozen=True)
class Base:
    folder: paths.Path
    config: ModelConfig
    params: dict  # the tree of parameters, with a `StoredLeaf` at every leaf
    fingerprint: str  # the same for the same weights, whatever the format


def read_base(where: paths.PathLike) -> Base:
    """Open a base, a folder or a name on the hub: its config and tensors, checked against each other. Reads a few megabytes."""
    folder = hub.base_folder(where)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a base model, or its name on the hub")
    others = huggingface.has_weights(folder) or (folder / native.MANIFEST).is_file()
    if (folder / meta.PARAMS).is_file() and not (others and (folder / "config.json").is_file()):
        config, tensors = meta.open_folder(folder)
    else:
        config = read_config(folder)
        if (folder / native.MANIFEST).is_file():
            tensors, identity = native.open_folder(folder, config)
            return Base(folder, config, _tree(tensors, native.names(config), config, transposed=False), identity)
        tensors = huggingface.open_folder(folder)
    tensors = check(tensors, config, where=str(folder))
    names = {path: name for path, (name, _) in hf_tensors(config).items()}
    return Base(folder, config, _tree(tensors, names, config, transposed=True), fingerprint(tensors))


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of `params` that is still in the files: one tensor, or the stacked tensors of all layers."""

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
        """One layer of a stacked leaf, in its stored dtype."""
        return self.read((slice(layer, layer + 1), *(slice(None),) * (len(self.shape) - 1)), self.dtype)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape), dtype or self.dtype)

    def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part at `index` (a slice per axis), in `dtype`, rounded to nearest even; nothing else is read."""
        spans = spans_of(index, self.shape)
        return self.read_into(np.empty([span.stop - span.start for span in spans], dtype), spans)

    def read_into(self, out: np.ndarray, index: Iterable[slice]) -> np.ndarray:
        """`read` into an array that exists."""
        spans = spans_of(index, self.shape)
        if self.stacked:
            for place, tensor in zip(out, self.tensors[spans[0]], strict=True):
                self._fill(place, tensor, spans[1:])
        else:
            self._fill(out, self.tensors[0], spans)
        return out

    def _fill(self, out: np.ndarray, tensor: Tensor, spans: list[slice]) -> None:
        """Write a part of one tensor into `out`, band of rows by band of rows."""
        rows, *columns = reversed(spans) if self.transposed else spans
        width = math.prod(span.stop - span.start for span in columns) * tensor.dtype.itemsize
        windows = cut(rows, rows_within(WINDOW_BYTES, tensor.nbytes // max(1, tensor.shape[0])))
        for window, following in itertools.zip_longest(windows, windows[1:]):
            if window is windows[0]:
                tensor.expect((window, *columns))
            if following:
                tensor.expect((following, *columns))
            for band in cut(window, rows_within(BAND_BYTES, width)):
                part = tensor.read((band, *columns))
                place = slice(band.start - rows.start, band.stop - rows.start)
                if self.transposed:
                    transpose(part, out[:, place])
                else:
                    out[place] = part


def _tree(tensors: Mapping[str, Tensor], names: Mapping[str, str], config: ModelConfig, transposed: bool) -> dict:
    """The `params` tree with a `StoredLeaf` at every leaf; `transposed`: kernels are stored [out, in].

    `names`: path -> name among the tensors, with `{}` for the layer.
    """
    tree: dict = {}
    for path, name in names.items():
        stacked = "{}" in name
        of_layers = tuple(tensors[name.format(i)] for i in range(config.layers if stacked else 1))
        set_path(tree, path.split("/"), StoredLeaf(of_layers, stacked, transposed and path.endswith("/kernel")))
    return tree


def spans_of(index: Iterable[slice], shape: tuple[int, ...]) -> list[slice]:
    """The same slices with both ends explicit."""
    return [slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)]
