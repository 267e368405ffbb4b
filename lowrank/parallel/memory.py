"""How much memory there is, and what a sweep's member needs of it: estimates, to choose how many train at once."""

import contextlib
import os

import jax
from jax.sharding import Mesh


def free_bytes(mesh: Mesh) -> int:
    """Free on each device of the mesh: as the device says, else an even share of what this machine has available."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return available // jax.local_device_count()


def residual_bytes(function, *arguments) -> int:
    """What the backward pass of `function` (of arrays or their shapes) keeps of its forward pass; nothing is computed."""
    residuals = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
