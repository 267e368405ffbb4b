"""The device mesh and the one table from logical axes to mesh axes.

Every array names its logical axes once, where it is declared; its sharding is derived here. There is no catch-all: an
axis without a rule, or an array whose axes claim one mesh axis twice, is an error, because a parameter that is silently
replicated costs memory that nobody looks for.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank.errors import UserError
from lowrank.parallel.config import MeshConfig

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "group": "data",  # rows whose embeddings the devices along fsdp look up together, each its part of `embed`
    "length": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A data x fsdp x tensor mesh of the devices (default: all)."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        rest = sizes.index(-1)
        sizes[rest] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not use the "
            f"{len(devices)} devices here exactly; choose sizes whose product is {len(devices)}"
        )
    # Not `jax.make_mesh`: it refuses axes that are not whole dimensions of the slice (fsdp=16 x tensor=4 on 8x8).
    grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def put(value, sharding: NamedSharding | None) -> jax.Array:
    """Shard an array that every process holds whole: each process sends its own devices their shards.

    `jax.device_put` would first compare the arrays of all processes, in a collective over all devices.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.jit(lambda value: value, out_shardings=sharding)(value)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are cut into; 1 for the empty mesh."""
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def members_mesh(mesh: Mesh) -> Mesh:
    """The same devices for a sweep: a fourth axis, `member`, takes those of `data`, so each trains other members."""
    devices = mesh.devices.reshape(mesh.shape["data"], 1, mesh.shape["fsdp"], mesh.shape["tensor"])
    return Mesh(devices, ("member", *mesh.axis_names), axis_types=(AxisType.Auto,) * 4)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of one array -> its PartitionSpec. ValueError for an axis without a rule, or a mesh axis claimed twice."""
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axes {unknown} of {axes} match no rule in parallel/mesh.py")
    entries = [axis and RULES[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ([entry] if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} claim a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def with_shardings(mesh: Mesh, logical_axes: dict, shapes: dict) -> dict:
    """A tree of logical axes (tuples) and one of shapes -> the tree of ShapeDtypeStructs with their shardings.

    UserError that lists every axis whose size its mesh axes do not divide.
    """
    offenders = []

    def lay_out(path, shape, axes):
        sharding = NamedSharding(mesh, spec(axes))
        for size, axis, entry in zip(shape.shape, axes, sharding.spec, strict=True):
            names = (entry,) if isinstance(entry, str) else entry or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                name = "/".join(key.key for key in path)
                offenders.append(f"{name} has {size} along {axis}, not divisible by {'x'.join(names)}={parts}")
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    tree = jax.tree_util.tree_map_with_path(lay_out, shapes, logical_axes)
    if offenders:
        raise UserError(f"mesh: the model cannot be cut this way: {'; '.join(offenders)}; choose other mesh sizes")
    return tree


def check_heads(mesh: Mesh, heads: int, kv_heads: int) -> None:
    """UserError if `tensor` would split a head: `heads * head_dim` may be divisible where `heads` is not."""
    parts = mesh.shape["tensor"]
    cut = [f"{name}={count}" for name, count in (("heads", heads), ("kv_heads", kv_heads)) if count % parts]
    if cut:
        raise UserError(f"mesh.tensor={parts} does not divide the model's {' and '.join(cut)}; choose a smaller one")


def check_rows(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """UserError if the rows of a micro-batch do not divide over the devices."""
    shards = batch_shards(mesh)
    if batch_size // microbatches % shards:
        raise UserError(
            f"config.train.batch_size={batch_size} in {microbatches} micro-batches does not divide over {shards} devices "
            f"(mesh data x fsdp); make it a multiple of {microbatches * shards}"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation under the ambient mesh (`jax.set_mesh`); without one, return x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
