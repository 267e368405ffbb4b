"""The five arrays of a step: their names, shapes and layout over the mesh, said once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lowrank.parallel import mesh as mesh_lib


class Batch(NamedTuple):
    """Rows of tokens, each array [B, T]; NumPy on the host, jax.Array on the devices, or shapes."""

    inputs: Any  # int32 [B, T]
    targets: Any  # int32 [B, T], the token after each input
    positions: Any  # int32 [B, T], from 0 in every example
    segment_ids: Any  # int32 [B, T], from 1 in every row; 0 is padding
    loss_mask: Any  # bool [B, T], True where the target is trained


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of each array: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, mesh_lib.spec(("batch", "length")))


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
    """ShapeDtypeStructs of a batch laid out over the mesh."""
    dtypes = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
    return Batch(*(jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh)) for dtype in dtypes))


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """Place a host batch, its rows spread over the mesh; each process gives its own devices their rows."""
    return Batch(*(mesh_lib.put(array, batch_sharding(mesh)) for array in batch))
