"""A slice of TPUs by its name, `v5e:2x4`: devices to compile for, on a machine that has none.

Its one idea: what a collective has of the interconnect follows from where its group lies in the slice. Along each dimension
that the group's chips differ in they have one link's bandwidth, or two links' where it is a whole ring.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import re
import typing

import jax
from jax.experimental import topologies

from lowrank.errors import UserError
from lowrank.parallel.compiling import without_compile_cache
from lowrank.planning.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Slice:
    """`devices` are what a mesh is made of: they can be compiled for, not computed on."""

    chip: Chip
    topology: str
    devices: typing.Sequence[jax.Device]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.topology}"

    @property
    def chips(self) -> int:
        return self.chip.chips(self.topology)

    @property
    def memory(self) -> int:
        """Bytes that a program may have on one device."""
        return self.chip.memory // self.chip.devices

    def group_bandwidth(self, devices: typing.Sequence[jax.Device]) -> float:
        """Bytes a second that a chip can send in a collective over these devices."""
        places = [device.coords for device in devices]
        spread = [len(set(along)) for along in zip(*places, strict=True)]
        links = self._links(spread)
        return max(links, 1) * self.chip.link  # two devices of one chip: over something that is no slower

    @property
    def bandwidth(self) -> float:
        """As `group_bandwidth`, of all chips of the slice together."""
        return max(self._links(self.chip.dimensions(self.topology)), 1) * self.chip.link

    def _links(self, spread: typing.Sequence[int]) -> int:
        """Of a group that lies over so many places along each dimension."""
        dimensions = zip(
            self.chip.dimensions(self.topology), self.chip.rings(self.topology), spread, strict=False
        )  # devices of a 2-D slice have a third coordinate, which is 0
        return sum(2 if ring and count == size else 1 for size, ring, count in dimensions if count > 1)

    def compiling(self) -> typing.ContextManager:
        """To compile in. Without the compile cache: what it holds cannot be loaded where there is no TPU."""
        return without_compile_cache()

    @property
    def pair_bandwidth(self) -> float:
        """Of permutes between neighbours, which the compiler sends in both directions at a time."""
        return 2 * self.chip.link


def find(name: str) -> tuple[Chip, str]:
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
    """The devices of the slice `name`, from libtpu."""
    chip, topology = find(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: compiling for a TPU needs libtpu, which is not installed; pip install 'lowrank[plan]', or "
            "make .venv/.installed EXTRAS=plan in a checkout"
        )
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time may compile
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}  # a host has 2x2 unless it is said
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{topology}", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: libtpu does not know it: {str(error).splitlines()[0]}") from None
    return Slice(chip, topology, description.devices)


def sizes_in(message: str) -> tuple[float, float] | None:
    """What a compiler says that a program needs, and what there is, in bytes; from the text of RESOURCE_EXHAUSTED."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

    def bytes_of(text):
        return float(text[:-1]) * units[text[-1]]

    with contextlib.suppress(TypeError, AttributeError):
        if used := re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message):
            return bytes_of(used[1]), bytes_of(used[2])
        needed = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
        return bytes_of(needed[1]), bytes_of(needed[2])
    return None
