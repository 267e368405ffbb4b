"""TODO weights.load"""

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

PIECE_BYTES = 2**24  # what goes to a device at once: many times what a transfer costs to start, little to hold
AHEAD = 2  # pieces that are read while another is put into its place


def load_params(base: Base, abstract: dict) -> dict:
    """The `params` tree in the dtypes and shardings (if any) that `abstract`, a tree of jax.ShapeDtypeStructs, says."""
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
    """The same cut, but of the tensors' rows alone; None if that saves no host anything, or cannot be.

    In a file columns cannot be had without the rows that they lie in. So where many hosts want other columns of a file that is
    far away, each fetches other rows, and the devices exchange their parts, which takes them a moment: every byte comes once.
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
    if not moved or (hosts.max(over) == hosts.min(over)).all():  # a host's own devices have all columns of their rows
        return None
    if leaf.shape[row] % math.prod(mesh.shape[name] for name in axes[row]):
        return None
    return NamedSharding(mesh, P(*(names or None for names in axes)))


def _load(leaf: StoredLeaf, wanted: jax.ShapeDtypeStruct, pool: concurrent.futures.Executor) -> jax.Array:
    """One leaf, filled in place: all shards of this host get a piece at a time, read while the one before is placed."""
    if leaf.shape != wanted.shape:
        raise ValueError(f"a leaf of shape {wanted.shape} is wanted, the config makes it {leaf.shape}")
    shape, dtype, sharding = wanted.shape, wanted.dtype, wanted.sharding
    shard, devices = shape, {(0,) * len(shape): [None]}  # where a shard begins -> the devices of this host that hold it
    if sharding is not None:
        shard, devices = sharding.shard_shape(shape), collections.defaultdict(list)
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            devices[tuple(span.start for span in spans_of(index, shape))].append(device)

    def read(piece: tuple[slice, ...], parts: list[np.ndarray]) -> list[np.ndarray]:
        """The same piece of each shard; a shard that several devices hold is read once."""
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
    # The same memory again and again, because malloc keeps much of what was freed: a piece is read into that of the
    # piece before the one that is being placed.
    sizes = [[span.stop - span.start for span in piece] for piece in pieces]
    memory = itertools.cycle(_aligned((AHEAD + 1, len(devices), math.prod(sizes[0])), dtype))
    todo = ((p, [row[: math.prod(n)].reshape(n) for row in m]) for p, n, m in zip(pieces, sizes, memory))  # noqa: B905
    array = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for piece, parts in zip(pieces, ahead(pool, read, todo), strict=True):
        starts = np.array([span.start for span in piece], np.int32)
        array = _place(array, put(parts), starts, sharding).block_until_ready()
    return array


def _in_host_memory(sharding: Any) -> bool:
    """Whether the devices are CPUs: what is read for them is in its place already."""
    return jax.default_backend() == "cpu" if sharding is None else next(iter(sharding.device_set)).platform == "cpu"


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a cache line: for a CPU, JAX takes such an array as it lies, and would copy another."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(array: jax.Array, piece: jax.Array, starts: jax.Array, sharding: Any) -> jax.Array:
    """Write the piece of each device into its shard, at `starts`; in place, because the array is donated."""
    place = jax.lax.dynamic_update_slice
    if isinstance(sharding, NamedSharding):
        # Said device by device: left to itself, the compiler could as well gather the array to update it.
        spec = sharding.spec
        rules = {"mesh": sharding.mesh, "in_specs": (spec, spec, P()), "out_specs": spec, "check_vma": False}
        place = jax.shard_map(place, **rules)
    return place(array, piece, starts)


def _pieces(leaf: StoredLeaf, shard: tuple[int, ...], largest: int, together: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shard into pieces of at most so many elements: some layers, else some rows of one layer's tensor.

    Rows are the tensor's own, so a transposed leaf is cut along its last axis: every byte of a file is read once. And no
    more rows than lie in two windows of a file, even if only a few columns of them are wanted: of the devices that are read
    for `together`, those with other columns find the same rows still in memory.
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
    """`itertools.starmap(function, items)`, computed in the pool a few items ahead of whoever takes the results."""
    items = iter(items)
    waiting = collections.deque(pool.submit(function, *item) for item in itertools.islice(items, AHEAD))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(function, *item) for item in itertools.islice(items, 1))
        yield result
