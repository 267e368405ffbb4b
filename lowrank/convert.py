"""Make a native base of any base that lowrank reads: the weights as they lie in memory, to be read by any slice.

    python -m lowrank.convert --from=models/Llama-2-7b --to=bases/llama2-7b
    python -m lowrank.convert --from=models/Llama-2-7b --to=bases/llama2-7b --dtype=bfloat16

The new folder works wherever the old one did (`--base`, `config.base`), and has its tokenizer and chat template. It is
written piece by piece, read back and compared bit by bit, and gets its name last: a failure leaves nothing that looks
like a base.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from absl import flags

from lowrank.cli import run as cli
from lowrank.data.tokenizer import COMPANIONS
from lowrank.errors import UserError
from lowrank.families.config_json import hf_config
from lowrank.families.tensor_names import layout
from lowrank.files import paths
from lowrank.files.new_folder import carry, new_folder
from lowrank.weights import native
from lowrank.weights.base import BAND_BYTES, Base, StoredLeaf, read_base
from lowrank.weights.fingerprint import fingerprint
from lowrank.weights.load import AHEAD, ahead
from lowrank.weights.tensor_file import Tensor, cut, rows_within

flags.DEFINE_string("from", None, "The base to convert: a folder of any supported format.")
flags.DEFINE_string("to", None, "The folder to make.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of every tensor; default: each as it is stored.")
FLAGS = flags.FLAGS

PIECE_BYTES = 2**24  # what is read, written and compared at once


def main(arguments: list[str]):
    cli.refuse_unknown(arguments)
    source, to = FLAGS["from"].value, FLAGS.to
    missing = [f"--{name}" for name, value in (("from", source), ("to", to)) if not value]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; see --help")
    if paths.path(source).resolve() == paths.path(to).resolve():
        raise UserError(f"--to={to} is the folder to convert; give another one")
    print(convert(read_base(source), to, FLAGS.dtype))


def convert(base: Base, to: str, dtype: str | None = None) -> str:
    """Write `base` as a native base in `dtype` (None: each tensor as it is stored) -> what to say of it."""
    config, identity, began = base.config, base.fingerprint, time.monotonic()
    if dtype:
        config = dataclasses.replace(config, stored_dtype=dtype)
        identity = fingerprint(huggingface_tensors(base, jnp.dtype(dtype)))
    parts = list(parts_of(base, dtype and jnp.dtype(dtype)))
    bar = rich.progress.Progress(console=rich.console.Console(stderr=True), disable=not sys.stderr.isatty())
    with new_folder(to) as partial, bar, concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        (partial / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8")
        carry(base.folder, partial, (*COMPANIONS, "generation_config.json"))
        pieces = bar.track(ahead(pool, read, spare(parts)), total=len(parts), description="writing")
        native.write(partial, config, {part.name: part.dtype for part in parts}, pieces, identity)

        written = read_base(partial)
        pairs = zip(spare(parts), spare(parts_of(written)), strict=True)
        compared = bar.track(ahead(pool, difference, pairs), total=len(parts), description="reading back")
        wrong = {name for name in compared if name}
        if (written.config, written.fingerprint) != (config, identity):
            wrong.add("config.json")
        if wrong:
            raise UserError(f"{to}: reads back other than it was written: {', '.join(sorted(wrong))}; check the disk")
        files = len([*partial.glob("*.safetensors")])
        size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    ended = time.monotonic()
    count = sum(math.prod(shape) for shape in native.shapes(config).values())
    return (
        f"converted {base.folder} to {to}: {count:,} parameters, {size / 1e9:.3g} GB in {files} "
        f"file{'s' * (files > 1)}, {'/'.join(sorted({part.dtype.name for part in parts}))}, fingerprint {identity}; "
        f"{ended - began:.1f} s, {size / (ended - began) / 1e6:.0f} MB/s; read back, every bit equal"
    )


class Part(NamedTuple):
    """Some rows of a tensor of a native base: where they are read from, and what they become."""

    name: str
    leaf: StoredLeaf
    index: tuple[slice, ...]
    dtype: np.dtype


def parts_of(base: Base, dtype: np.dtype | None = None) -> Iterator[Part]:
    """All rows of all tensors of a native base, in the order of its files."""
    for path, name in native.names(base.config).items():
        leaf = functools.reduce(operator.getitem, path.split("/"), base.params)
        rows, *columns = (slice(0, size) for size in leaf.shape[leaf.stacked :])
        for layer, tensor in enumerate(leaf.tensors):
            held = dtype or tensor.dtype
            width = math.prod(span.stop for span in columns) * held.itemsize
            for band in cut(rows, rows_within(PIECE_BYTES, width)):
                layers = (slice(layer, layer + 1),) if leaf.stacked else ()
                yield Part(name.format(layer), leaf, (*layers, band, *columns), held)


def spare(parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with memory to read it into: the same again and again, in turns with those that are read ahead."""
    memory = np.empty((AHEAD + 1, PIECE_BYTES), np.uint8)
    for part, place in zip(parts, itertools.cycle(memory)):
        sizes = [span.stop - span.start for span in part.index]
        yield part, place[: math.prod(sizes) * part.dtype.itemsize].view(part.dtype).reshape(sizes)


def read(part: Part, out: np.ndarray) -> np.ndarray:
    """The rows, rounded once to the dtype that they get; refused where it cannot hold them."""
    with np.errstate(over="ignore"):  # looked for below
        part.leaf.read_into(out, part.index)
    if part.dtype != part.leaf.dtype and not np.isfinite(out).all():
        raise UserError(f"{part.name}: holds infinite or undefined values in {part.dtype}; choose another dtype")
    return out[0] if part.leaf.stacked else out


def difference(source: tuple[Part, np.ndarray], written: tuple[Part, np.ndarray]) -> str | None:
    """The name of the part if what was written is not, bit for bit, what it was written from."""
    same = source[0].dtype == written[0].dtype
    ours, theirs = (read(part, out).reshape(-1).view(np.uint8) for part, out in (source, written))
    if same and all(np.array_equal(ours[band], theirs[band]) for band in cut(slice(0, ours.size), BAND_BYTES)):
        return None
    return source[0].name


def huggingface_tensors(base: Base, dtype: np.dtype) -> dict[str, Tensor]:
    """The tensors that a Hugging Face folder of these weights in `dtype` would hold."""
    tensors = {}
    for path, (name, shape) in layout(base.config).items():
        leaf = functools.reduce(operator.getitem, path.split("/"), base.params)
        turned = path.endswith("kernel") and not leaf.transposed
        for layer, tensor in enumerate(leaf.tensors):

            def read(index, tensor=tensor, turned=turned):
                with np.errstate(over="ignore"):
                    return (tensor.read(index[::-1]).T if turned else tensor.read(index)).astype(dtype)

            tensors[name.format(layer)] = Tensor(shape, dtype, read)
    return tensors


if __name__ == "__main__":
    cli.run(main)
