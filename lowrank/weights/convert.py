"""Convert any base to a native one: the weights as they lie in memory, written piece by piece and compared bit by bit."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from lowrank.data.tokenizer import COMPANIONS
from lowrank.errors import UserError
from lowrank.families.config_json import hf_config
from lowrank.families.tensor_names import hf_tensors
from lowrank.files import paths
from lowrank.files.new_folder import carry, new_folder
from lowrank.weights import native
from lowrank.weights.base import BAND_BYTES, Base, StoredLeaf, read_base
from lowrank.weights.fingerprint import fingerprint
from lowrank.weights.load import AHEAD, ahead
from lowrank.weights.tensor_file import Tensor, cut, rows_within

PIECE_BYTES = 2**24  # what is read, written and compared at once


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A native base that was written and read back."""

    folder: pathlib.Path
    parameters: int
    dtypes: tuple[str, ...]
    fingerprint: str
    files: int  # that hold the weights
    nbytes: int  # of these files
    seconds: float


def convert(base, to: str | os.PathLike, dtype: str | None = None, *, progress: bool = False) -> Conversion:
    """Write a base (a folder, or what `read_base` gave) as a native base in the new folder `to`, and read it back.

    `dtype`: of every tensor (None: each as it is stored). `progress`: show a bar on stderr. The folder gets its name last,
    so a failure leaves nothing. Raises UserError.
    """
    base = base if isinstance(base, Base) else read_base(base)
    if base.folder.resolve() == paths.path(to).resolve():
        raise UserError(f"{to} is the folder to convert; give another one")
    config, identity, began = base.config, base.fingerprint, time.monotonic()
    if dtype:
        config = dataclasses.replace(config, stored_dtype=dtype)
        identity = fingerprint(huggingface_tensors(base, jnp.dtype(dtype)))
    parts = list(parts_of(base, jnp.dtype(dtype) if dtype else None))
    bar = rich.progress.Progress(console=rich.console.Console(stderr=True), disable=not progress)
    with new_folder(to) as partial, bar, concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        (partial / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8")
        carry(base.folder, partial, (*COMPANIONS, "generation_config.json"))
        pieces = bar.track(ahead(pool, read, with_memory(parts)), total=len(parts), description="writing")
        native.write(partial, config, {part.name: part.dtype for part in parts}, pieces, identity)

        written = read_base(partial)
        pairs = zip(with_memory(parts), with_memory(parts_of(written)), strict=True)
        compared = bar.track(ahead(pool, compare, pairs), total=len(parts), description="reading back")
        wrong = {name for name in compared if name}
        if (written.config, written.fingerprint) != (config, identity):
            wrong.add("config.json")
        if wrong:
            raise UserError(f"{to}: reads back other than it was written: {', '.join(sorted(wrong))}; check the disk")
        sizes = [file.stat().st_size for file in partial.glob("*.safetensors")]
    parameters = sum(math.prod(shape) for shape in native.shapes(config).values())
    dtypes = tuple(sorted({part.dtype.name for part in parts}))
    seconds = time.monotonic() - began
    return Conversion(pathlib.Path(to), parameters, dtypes, identity, len(sizes), sum(sizes), seconds)


class Part(NamedTuple):
    """Some rows of the tensor `name` of a native base: they are read at `span` of `leaf` and written in `dtype`."""

    name: str
    leaf: StoredLeaf
    span: tuple[slice, ...]
    dtype: np.dtype


def parts_of(base: Base, dtype: np.dtype | None = None) -> Iterator[Part]:
    """All rows of all tensors of a native base, in the order of its files."""
    for path, name in native.names(base.config).items():
        leaf: Any = functools.reduce(operator.getitem, path.split("/"), base.params)
        rows, *columns = (slice(0, size) for size in leaf.shape[leaf.stacked :])
        for layer, tensor in enumerate(leaf.tensors):
            held = dtype or tensor.dtype
            width = math.prod(span.stop for span in columns) * held.itemsize
            for band in cut(rows, rows_within(PIECE_BYTES, width)):
                layers = (slice(layer, layer + 1),) if leaf.stacked else ()
                yield Part(name.format(layer), leaf, (*layers, band, *columns), held)


def with_memory(parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with an array to read it into; AHEAD + 1 pieces of memory take turns."""
    memory = np.empty((AHEAD + 1, PIECE_BYTES), np.uint8)
    for part, piece in zip(parts, itertools.cycle(memory), strict=False):
        sizes = [span.stop - span.start for span in part.span]
        yield part, piece[: math.prod(sizes) * part.dtype.itemsize].view(part.dtype).reshape(sizes)


def read(part: Part, out: np.ndarray) -> np.ndarray:
    """The rows, rounded once to the part's dtype; UserError if it cannot hold them."""
    with np.errstate(over="ignore"):  # checked in the next line
        part.leaf.read_into(out, part.span)
    if part.dtype != part.leaf.dtype and not np.isfinite(out).all():
        raise UserError(f"{part.name}: holds infinite or undefined values in {part.dtype}; choose another dtype")
    return out[0] if part.leaf.stacked else out


def compare(source: tuple[Part, np.ndarray], written: tuple[Part, np.ndarray]) -> str | None:
    """The name of the tensor if the written rows differ in any bit from the rows they were written from."""
    same = source[0].dtype == written[0].dtype
    ours, theirs = (read(part, out).reshape(-1).view(np.uint8) for part, out in (source, written))
    if same and all(np.array_equal(ours[band], theirs[band]) for band in cut(slice(0, ours.size), BAND_BYTES)):
        return None
    return source[0].name


def huggingface_tensors(base: Base, dtype: np.dtype) -> dict[str, Tensor]:
    """The tensors that a Hugging Face folder of these weights in `dtype` would hold."""
    tensors = {}
    for path, (name, shape) in hf_tensors(base.config).items():
        leaf: Any = functools.reduce(operator.getitem, path.split("/"), base.params)
        transposed = path.endswith("kernel") and not leaf.transposed
        for layer, tensor in enumerate(leaf.tensors):

            def read(index, tensor=tensor, transposed=transposed):
                with np.errstate(over="ignore"):
                    return (tensor.read(index[::-1]).T if transposed else tensor.read(index)).astype(dtype)

            tensors[name.format(layer)] = Tensor(shape, dtype, read)
    return tensors
