"""A slice of TPUs by its name, `v5e:2x4`: devices to compile for on a machine that has none; or this machine's own devices.

A collective's share of the interconnect follows from where its group lies in the slice: one link's bandwidth along each
dimension in which the group's chips differ, two links' where the group is a whole ring.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lowrank.errors import UserError
from lowrank.parallel import launchers
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.memory import free_bytes
from lowrank.planning.chips import CHIPS, Chip
from lowrank.runs.speed import best_seconds, product_flops


@dataclass(frozen=True)
class Slice:
    """Chips that are joined. A mesh is made of `devices`, for which programs are compiled and which compute nothing."""

    chip: Chip
    topology: str
    devices: Sequence[jax.Device]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.topology}"

    @property
    def chips(self) -> int:
        return self.chip.chips(self.topology)

    @property
    def memory(self) -> int:
        """Bytes that a program may use on one device."""
        return self.chip.memory // self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a chip can send in a collective over the whole slice."""
        return self._bandwidth(self.chip.dimensions(self.topology))

    @property
    def pair_bandwidth(self) -> float:
        """Bytes a second that a chip can send in a permute between neighbours, which uses both directions of a link."""
        return 2 * self.chip.link

    def group_bandwidth(self, devices: Sequence[jax.Device]) -> float:
        """Bytes a second that a chip can send in a collective over these devices."""
        places = zip(*(device.coords for device in devices), strict=True)
        return self._bandwidth([len(set(along)) for along in places])

    def _bandwidth(self, spread: Sequence[int]) -> float:
        """Of a group that has `spread` places along each dimension. Two devices of one chip have a link's at the least."""
        sizes, rings = self.chip.dimensions(self.topology), self.chip.rings(self.topology)
        along = zip(sizes, rings, spread, strict=False)  # devices of a 2-D slice have a third coordinate, which is 0
        links = sum(2 if ring and count == size else 1 for size, ring, count in along if count > 1)
        return max(links, 1) * self.chip.link


class LocalSlice(Slice):
    """This machine's devices. Their links are taken to be as fast as their memory, which CPU devices share."""

    @property
    def name(self) -> str:
        return "local"

    @property
    def bandwidth(self) -> float:
        return self.chip.link

    def group_bandwidth(self, devices: Sequence[jax.Device]) -> float:
        return self.chip.link


def parse_name(name: str) -> tuple[Chip, str]:
    """`v5e:2x4` -> the chip and the topology. UserError that lists what there is."""
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
    return chip, topology


def open_slice(name: str) -> Slice:
    """The slice `name`, its devices described by libtpu."""
    chip, topology = parse_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: compiling for a TPU needs libtpu, which is not installed; pip install 'lowrank[plan]', or "
            "make .venv/.installed EXTRAS=plan in a checkout"
        )
    launchers.silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time may compile
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}  # libtpu's default is 2x2 a host
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: libtpu does not know it: {str(error).splitlines()[0]}") from None
    return Slice(chip, topology, description.devices)


def open_local(dtype: jnp.dtype) -> LocalSlice:
    """All devices of this machine as chips; FLOP/s (of products in `dtype`) and memory bandwidth are measured."""
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
    device, count = mesh.devices.flat[0], str(mesh.devices.size)
    array = jax.device_put(jnp.ones(2**26, jnp.float32), device)
    bandwidth = 2 * array.nbytes / best_seconds(jax.jit(lambda x: x + 1), array)  # read and written
    chip = Chip("local", product_flops(device, dtype), free_bytes(mesh), bandwidth, bandwidth, (count,))
    return LocalSlice(chip, count, list(mesh.devices.flat))


def parse_exhausted(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and bytes that there are, from the compiler's RESOURCE_EXHAUSTED; None: it names none."""
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(pattern, message):
            units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return float(match[1]) * units[match[2]], float(match[3]) * units[match[4]]
    return None
