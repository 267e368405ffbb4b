"""How much device memory is free, and how much a backward pass needs: to choose how many members train at once."""

import contextlib
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh


def free_bytes(mesh: Mesh) -> int:
    """Free bytes on each device of the mesh: as the device reports, else an even share of this machine's available memory."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return available // jax.local_device_count()


def residual_bytes(function: Callable, *arguments) -> int:
    """Bytes of residuals that the forward pass of `function` (of arrays or their shapes) saves; computes nothing."""
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
