"""Load a base's parameters onto the devices.

Files are read in pieces of some megabytes that go straight to their place: beside the finished parameters only a few pieces
are in memory. A thread reads ahead while the piece before is placed.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank.files import paths
from lowrank.weights.base import WINDOW_BYTES, Base, StoredLeaf, spans_of
from lowrank.weights.tensor_file import cut, rows_within

PIECE_BYTES = 2**24  # per transfer to a device: long against a transfer's start, small against memory
AHEAD = 2  # pieces that are read while another is placed


def load_params(base: Base, abstract: dict) -> dict:
    """The `params` tree in the dtypes and shardings (if any) of `abstract`, a tree of jax.ShapeDtypeStructs."""
    far = paths.is_remote(base.folder) and jax.process_count() > 1

    def load(leaf: StoredLeaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = _by_rows(leaf, wanted) if far else None
        if sharding is None:
            return _load(leaf, wanted, pool)
        array = _load(leaf, jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding), pool)
        return jax.jit(lambda array: array, out_shardings=wanted.sharding, donate_argnums=0)(array).block_until_ready()

    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        return jax.tree.map(load, base.params, abstract)


def _by_rows(leaf: StoredLeaf, wanted: jax.ShapeDtypeStruct) -> NamedSharding | None:
    """The wanted sharding with every split moved to the tensors' rows; None if no host would read less, or they do not divide.

    Columns of a file cannot be fetched without their rows. So where hosts want different columns of a file in a bucket, each
    fetches different rows, and the devices then exchange their parts, which is fast: every byte is fetched once.
    """
    if not isinstance(wanted.sharding, NamedSharding):
        return None
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in wanted.sharding.spec]
    axes += [()] * (len(leaf.shape) - len(axes))
    row = len(axes) - 1 if leaf.transposed else int(leaf.stacked)
    columns = [axis for axis in range(int(leaf.stacked), len(axes)) if axis != row and axes[axis]]
    moved = [name for axis in columns for name in axes[axis]]
    axes[row] = (*axes[row], *moved)
    for axis in columns:
        axes[axis] = ()
    mesh = wanted.sharding.mesh
    over = tuple(mesh.axis_names.index(name) for name in moved)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if not moved or (hosts.max(over) == hosts.min(over)).all():  # each host holds all columns of its rows
        return None
    if leaf.shape[row] % math.prod(mesh.shape[name] for name in axes[row]):
        return None
    return NamedSharding(mesh, P(*(names or None for names in axes)))


def _load(leaf: StoredLeaf, wanted: jax.ShapeDtypeStruct, pool: concurrent.futures.Executor) -> jax.Array:
    """One leaf, filled in place: a piece of every shard of this host at a time, read while the last one is placed."""
    if leaf.shape != wanted.shape:
        raise ValueError(f"a leaf of shape {wanted.shape} is wanted, the config makes it {leaf.shape}")
    shape, dtype, sharding = wanted.shape, wanted.dtype, wanted.sharding
    shard, devices = shape, {(0,) * len(shape): [None]}  # a shard's start -> this host's devices that hold it
    if sharding is not None:
        shard, devices = sharding.shard_shape(shape), collections.defaultdict(list)
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            devices[tuple(span.start for span in spans_of(index, shape))].append(device)

    def read(piece: tuple[slice, ...], parts: list[np.ndarray]) -> list[np.ndarray]:
        """The same piece of each shard; a shard on several devices is read once."""
        for part, start in zip(parts, devices, strict=True):
            leaf.read_into(part, [slice(at + s.start, at + s.stop) for at, s in zip(start, piece, strict=True)])
        return parts

    def put(parts: list[np.ndarray]) -> jax.Array:
        places = zip(parts, devices.values(), strict=True)
        arrays = [jax.device_put(part, device) for part, holders in places for device in holders]
        if sharding is None:
            return arrays[0]
        whole = [n * size // own for n, size, own in zip(parts[0].shape, shape, shard, strict=True)]
        return jax.make_array_from_single_device_arrays(tuple(whole), sharding, arrays)

    together = 1 if sharding is None else len(sharding.device_set) // jax.process_count()  # the same on every host
    largest = PIECE_BYTES // max(leaf.dtype.itemsize, dtype.itemsize) // together
    pieces = list(_pieces(leaf, shard, largest, together))
    if len(pieces) == 1 or _in_host_memory(sharding):
        shards = [_aligned(shard, dtype) for _ in devices]
        for _ in ahead(pool, read, ((piece, [held[piece] for held in shards]) for piece in pieces)):
            pass
        return put(shards)
    # Buffers are reused in turn, because malloc keeps much of the memory that is freed.
    sizes = [[span.stop - span.start for span in piece] for piece in pieces]
    memory = itertools.cycle(_aligned((AHEAD + 1, len(devices), math.prod(sizes[0])), dtype))
    todo = ((p, [row[: math.prod(n)].reshape(n) for row in m]) for p, n, m in zip(pieces, sizes, memory))  # noqa: B905
    array = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for piece, parts in zip(pieces, ahead(pool, read, todo), strict=True):
        starts = np.array([span.start for span in piece], np.int32)
        array = _place(array, put(parts), starts, sharding).block_until_ready()
    return array


def _in_host_memory(sharding: Any) -> bool:
    """Whether the devices are CPUs, which use the host's arrays as they are."""
    return jax.default_backend() == "cpu" if sharding is None else next(iter(sharding.device_set)).platform == "cpu"


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a 64-byte boundary, which JAX uses on a CPU without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(array: jax.Array, piece: jax.Array, starts: jax.Array, sharding: Any) -> jax.Array:
    """Write each device's piece into its shard at `starts`, in place: the array is donated."""
    place = jax.lax.dynamic_update_slice
    if isinstance(sharding, NamedSharding):
        # Per device: otherwise the compiler may gather the array to update it.
        spec = sharding.spec
        rules = {"mesh": sharding.mesh, "in_specs": (spec, spec, P()), "out_specs": spec, "check_vma": False}
        place = jax.shard_map(place, **rules)
    return place(array, piece, starts)


def _pieces(leaf: StoredLeaf, shard: tuple[int, ...], largest: int, together: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shard into pieces of at most `largest` elements: some layers, else some rows of one layer's tensor.

    Rows are the stored tensor's, so a transposed leaf is cut along its last axis and every byte is read once. A piece spans
    at most two windows of a file, however few columns are wanted: then the devices that are read for `together` and
    want other columns find the same rows still in memory.
    """
    inner = shard[1:] if leaf.stacked else shard
    size = math.prod(inner)
    axis = len(inner) - 1 if leaf.transposed else 0
    rows = inner[axis] if size <= largest else rows_within(largest, size // inner[axis])
    others = min(together, leaf.shape[-1 if leaf.transposed else leaf.stacked] // inner[axis])  # shards with other rows
    in_file = leaf.tensors[0].nbytes // leaf.tensors[0].shape[0]
    rows = min(rows, rows_within(2 * WINDOW_BYTES // others, in_file))
    layers = cut(slice(0, shard[0]), max(1, largest // size)) if leaf.stacked else [None]
    for layer, band in itertools.product(layers, cut(slice(0, inner[axis]), rows)):
        spans = [slice(0, n) for n in inner]
        spans[axis] = band
        yield tuple(spans) if layer is None else (layer, *spans)


def ahead(pool: concurrent.futures.Executor, function: Callable, items: Iterable) -> Iterator:
    """`itertools.starmap(function, items)`, computed in the pool a few items ahead of the caller."""
    items = iter(items)
    waiting = collections.deque(pool.submit(function, *item) for item in itertools.islice(items, AHEAD))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(function, *item) for item in itertools.islice(items, 1))
        yield result
