"""A slice of TPUs by its name, `v5e:2x4`: devices to compile for on a machine that has none; or this machine's own devices.

A collective's share of the interconnect follows from where its group lies in the slice: one link's bandwidth along each
dimension in which the group's chips differ, two links' where the group is a whole ring.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lowrank.errors import UserError
from lowrank.parallel import launchers
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.memory import free_bytes
from lowrank.planning.chips import CHIPS, Chip
from lowrank.runs.speed import best_seconds, product_flops


class Slice(NamedTuple):
    """Chips that are joined. A mesh is made of `devices`, for which programs are compiled and which compute nothing."""

    name: str  # as v5e:2x4; local: this machine's own devices
    chip: Chip
    dimensions: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def chips(self) -> int:
        return math.prod(self.dimensions)

    @property
    def memory(self) -> int:
        """Bytes that a program may use on one device."""
        return self.chip.memory // self.chip.devices

    def bandwidth(self, group: Sequence[jax.Device] | None = None) -> float:
        """Bytes a second that a chip can send in a collective over these devices (None: all), of one chip a link's at least."""
        if self.name == "local":
            return self.chip.link
        sizes, full = self.dimensions, self.chip.full_torus
        spread = [len(set(along)) for along in zip(*(each.coords for each in group), strict=True)] if group else sizes
        if len(sizes) == 2:  # only a dimension as long as the 2-D pod's has its ends joined
            rings = [size == full for size in sizes]
        else:
            rings = [all(size % full == 0 for size in sizes)] * len(sizes)
        along = zip(sizes, rings, spread, strict=False)  # devices of a 2-D slice have a third coordinate, which is 0
        links = sum(2 if ring and count == size else 1 for size, ring, count in along if count > 1)
        return max(links, 1) * self.chip.link


def parse_name(name: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5e:2x4` -> the chip and the slice's dimensions. UserError that lists what there is."""
    kind, _, topology = name.partition(":")
    if kind not in CHIPS:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"--topology={name}: no chip is called {kind or 'that'}{meant}; say CHIP:TOPOLOGY with one of "
            f"{', '.join(CHIPS)}, as v5e:2x4, or local for this machine's own devices"
        )
    chip = CHIPS[kind]
    if topology not in chip.topologies:
        raise UserError(f"--topology={name}: {kind} has no such slice; there are {', '.join(chip.topologies)}")
    return chip, tuple(map(int, topology.split("x")))


def open_slice(name: str) -> Slice:
    """The slice `name`, its devices described by libtpu."""
    chip, dimensions = parse_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: compiling for a TPU needs libtpu, which is not installed; pip install 'lowrank[plan]', or "
            "make .venv/.installed EXTRAS=plan in a checkout"
        )
    launchers.silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time may compile
    options = {"chips_per_host_bounds": (1, 1, 1)} if dimensions == (1, 1) else {}  # libtpu's default is 2x2 a host
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: libtpu does not know it: {str(error).splitlines()[0]}") from None
    return Slice(name, chip, dimensions, description.devices)


def open_local(dtype: jnp.dtype) -> Slice:
    """All devices of this machine as chips. FLOP/s (of products in `dtype`) and memory bandwidth are measured; links are taken
    to be as fast as the memory, which CPU devices share."""
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
    devices = list(mesh.devices.flat)
    array = jax.device_put(jnp.ones(2**26, jnp.float32), devices[0])
    bandwidth = 2 * array.nbytes / best_seconds(jax.jit(lambda x: x + 1), array)  # read and written
    chip = Chip("local", product_flops(devices[0], dtype), free_bytes(mesh), bandwidth, bandwidth, ())
    return Slice("local", chip, (len(devices),), devices)


def parse_exhausted(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and bytes that there are, from the compiler's RESOURCE_EXHAUSTED; None: it names none."""
    size, units = r"([\d.]+)([KMGT])", {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    match = re.search(rf"(?:Used |\(){size}\)? (?:of|exceeds available HBM) \(?{size}", message)
    return (float(match[1]) * units[match[2]], float(match[3]) * units[match[4]]) if match else None
