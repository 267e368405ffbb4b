"""One plan: a config's step compiled for a slice, what it needs there, and what it is estimated to take.

And a search over plans: meshes, remat and micro-batches, ranked by hand first, then compiled from the best down.
"""

import dataclasses
import math
import typing

import jax
from jax.sharding import Mesh

from lowrank.config import Config
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.formatting import format_bytes
from lowrank.model.decoder import REMAT
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.mesh import MeshConfig
from lowrank.planning import roofline as cost
from lowrank.planning.collectives import Collective, collectives
from lowrank.planning.memory import Memory, memory_of
from lowrank.planning.roofline import Roofline, Share
from lowrank.planning.topology import Slice, sizes_in
from lowrank.runs.inputs import check_mesh
from lowrank.runs.setup import Step, abstract_step, compile_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a step does not fit there is no program: `memory` is then what its arguments need, `collectives` are unknown."""

    config: Config
    architecture: ModelConfig
    slice: Slice
    step: Step
    memory: Memory
    excess: float  # bytes above what a device has; 0 or less: it fits
    collectives: list[Collective]
    roofline: Roofline
    program: jax.stages.Compiled | None

    @property
    def fits(self) -> bool:
        return self.excess <= 0

    @property
    def mesh(self) -> Mesh:
        return self.step.mesh


def make_plan(config: Config, architecture: ModelConfig, slice: Slice, steps: int) -> Plan:
    mesh = mesh_lib.make_mesh(config.mesh, devices=slice.devices)
    check_mesh(mesh, config, architecture)
    step = abstract_step(config, architecture, mesh, steps)
    share = Share(config, architecture, *mesh.devices.shape)
    arguments = memory_of(step, None)

    def without_program(excess):
        by_hand = roofline(share, slice, None)
        return Plan(config, architecture, slice, step, arguments, excess, [], by_hand, None)

    if arguments.total > slice.memory:  # no program can help
        return without_program(arguments.total - slice.memory)
    try:
        with slice.compiling():
            program = compile_step(step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = sizes_in(str(error))
        if sizes is None:
            raise UserError(f"{slice.name}: the step does not fit, {str(error).splitlines()[0]}") from None
        return without_program(sizes[0] - sizes[1])
    memory, found = memory_of(step, program), collectives(program.as_text())
    times = roofline(share, slice, interconnect_seconds(found, slice, mesh))
    return Plan(config, architecture, slice, step, memory, memory.total - slice.memory, found, times, program)


def roofline(share: Share, slice: Slice, interconnect: float | None) -> Roofline:
    """Without the program's own seconds on the links, they are estimated by hand."""
    chip = slice.chip
    # A TPU makes a float32 product in full precision of six bfloat16 ones; a local device was measured in the run's own dtype.
    products = 6 if share.config.dtype == "float32" and slice.name != "local" else 1
    if interconnect is None:
        interconnect = cost.link_traffic(share) * chip.devices / slice.bandwidth
    return Roofline(
        compute=cost.flops(share) * products * chip.devices / chip.flops,
        memory=cost.memory_traffic(share) * chip.devices / chip.bandwidth,
        interconnect=interconnect,
    )


def interconnect_seconds(found: list[Collective], slice: Slice, mesh: Mesh) -> float:
    """One after the other, each at the bandwidth that its group has in the slice."""
    seconds = 0.0
    for one in found:
        devices = [mesh.devices.flat[place] for place in one.group]
        permute = one.kind == "collective-permute"
        bandwidth = slice.pair_bandwidth if permute else slice.group_bandwidth(devices)
        seconds += one.link_bytes * slice.chip.devices / bandwidth
    return seconds


# ---- The search ------------------------------------------------------------------------------------------------------


# Above this share of the memory a candidate is not tried. The guess of the temporaries was 0.7 to 1.3 of what the compiler then
# needed (Llama 2 7B and Llama 3 8B and 70B, over 1 to 16 chips).
HOPELESS = 1.1


def candidates(config: Config, architecture: ModelConfig, slice: Slice) -> list[tuple[float, Config]]:
    """Every mesh, remat and number of micro-batches that the model and the batch allow, with the bytes that it needs by hand:
    first those that fit by a guess, the fastest before the others, of equally fast ones the one whose compute, memory and
    links together take the least; then those that just may fit."""
    found, least = [], math.inf
    count = len(slice.devices)
    for tensor in _divisors(
        math.gcd(count, architecture.heads, architecture.kv_heads, architecture.mlp, architecture.vocab)
    ):
        for fsdp in _divisors(math.gcd(count // tensor, architecture.embed)):
            mesh = MeshConfig(count // tensor // fsdp, fsdp, tensor)
            rows = config.train.batch_size / (mesh.data * fsdp)
            for microbatches in _divisors(int(rows)) if rows.is_integer() else ():
                for remat in REMAT:
                    train = dataclasses.replace(config.train, microbatches=microbatches)
                    one = dataclasses.replace(config, mesh=mesh, remat=remat, train=train)
                    share = Share(one, architecture, mesh.data, fsdp, tensor)
                    needed = cost.arguments(share) + cost.temporaries(share)
                    least = min(least, needed)
                    if needed < HOPELESS * slice.memory:
                        times = roofline(share, slice, None)
                        together = times.compute + times.memory + times.interconnect
                        rank = (needed > slice.memory, float(f"{times.seconds:.3g}"), together)
                        found.append((rank, needed, one))
    if least == math.inf:
        raise UserError(
            f"{slice.name} has no mesh for this model and a batch of {config.train.batch_size} rows; choose another slice, or a "
            f"config.train.batch_size that {count} devices divide"
        )
    if not found:
        raise UserError(
            f"{slice.name} is too small: a step needs about {format_bytes(least)} on a device, by hand, and there are "
            f"{format_bytes(slice.memory)}; choose a larger slice, a smaller config.data.max_length or a smaller batch"
        )
    return [(needed, one) for _, needed, one in sorted(found, key=lambda entry: entry[0])]


def search(
    config: Config, architecture: ModelConfig, slice: Slice, steps: int, wanted: int, most: int
) -> typing.Iterator[Plan]:
    """Compile the candidates from the best down until `wanted` of them fit, or `most` are compiled. If none fits before the
    last, that one is the candidate that needs the least: so a slice is not too small only because guesses were too low."""
    fitting = 0
    ranked = candidates(config, architecture, slice)
    for number in range(min(most, len(ranked))):
        last = number == most - 1 and not fitting
        _, one = min(ranked[number:], key=lambda entry: entry[0]) if last else ranked[number]
        plan = make_plan(one, architecture, slice, steps)
        fitting += plan.fits
        yield plan
        if fitting == wanted:
            return


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
