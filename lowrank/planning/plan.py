"""Plan a training: compile its step for a slice, or search the slice's meshes, remat and micro-batches for the fastest."""

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lowrank.config import REMAT, Config
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.config_json import read_config
from lowrank.files import hub, paths
from lowrank.formatting import format_bytes
from lowrank.model.flops import step_flops
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import without_compile_cache
from lowrank.parallel.mesh import MeshConfig
from lowrank.planning import prices, roofline
from lowrank.planning.collectives import Collective, collectives
from lowrank.planning.cycles import StepTime, step_time
from lowrank.planning.memory import Memory, step_memory
from lowrank.planning.roofline import EFFICIENCY, Roofline, Share
from lowrank.planning.topology import Slice, open_local, open_slice, parse_exhausted
from lowrank.planning.workload import Bill, Workload, list_workloads
from lowrank.runs.adapter import refuse_other_layers
from lowrank.runs.inputs import architecture_of, check_mesh
from lowrank.runs.setup import Step, abstract_step, compile_step
from lowrank.weights.base import read_base


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's step on a slice. Where it does not fit there is no program, and `memory` is that of its arguments."""

    config: Config
    architecture: ModelConfig
    slice: Slice
    step: Step
    memory: Memory
    excess: float  # bytes above what a device has; 0 or less: it fits
    collectives: list[Collective]
    roofline: Roofline
    time: StepTime | None  # by the compiler's cycles; None without a program, and for devices whose compiler says none
    program: jax.stages.Compiled | None

    @property
    def fits(self) -> bool:
        return self.excess <= 0

    @property
    def slots(self) -> int:
        """Tokens of a step, padding included."""
        return self.config.train.batch_size * self.config.data.max_length


@dataclasses.dataclass(frozen=True)
class Result:
    """The plans that were compiled, and what they are priced by."""

    plans: list[Plan]  # best first: those that fit by time, then the others by their excess
    candidates: int | None  # how many a search ranked; None: there was no search
    workloads: list[Workload]
    efficiency: (
        float | None
    )  # share of the roofline that a real step is taken to reach; None: as the compiler's cycles say
    price: float | None  # dollars per chip and hour; None: none is known
    is_list_price: bool

    @property
    def best(self) -> Plan:
        return self.plans[0]

    @property
    def seconds(self) -> float:
        """Of a step with the best plan, as estimated."""
        return seconds_of(self.best, self.efficiency)

    def bill(self, workload: Workload, seconds: float | None = None) -> Bill:
        """What the workload takes with the best plan, at so many seconds a step (None: the estimate)."""
        return workload.bill(self.best.slots, seconds or self.seconds, self.best.slice.chips, self.price)


def seconds_of(plan: Plan, efficiency: float | None) -> float:
    """Of a step: by the compiler's cycles, or at this share of the roofline, or at `EFFICIENCY` of it where there are no cycles."""
    if plan.time and efficiency is None:
        return plan.time.seconds
    return plan.roofline.seconds / (efficiency or EFFICIENCY)


def plan(
    config: Config,
    topology: str,
    *,
    search: bool = False,
    search_fits: int = 3,
    search_most: int = 12,
    tokens: float | None = None,
    price_per_chip_hour: float | None = None,
    efficiency: float | None = None,
    progress: bool = False,
) -> Result:
    """Compile the config's training step for `topology`, a slice as "v5e:2x4", or "local": this machine's devices.

    It needs no weights, tokenizer or data (of a base on the hub, config.json); a slice needs libtpu. With `search`, meshes,
    remat and micro-batches are tried, of the same batch, until `search_fits` fit or `search_most` are compiled; `progress` prints a line for each to stderr.
    `tokens`: one more amount to price; `price_per_chip_hour`: dollars, in place of the list price.

    Whether the step fits is `result.best.fits`. Bytes and collectives are the compiler's; times and dollars are estimates.
    Raises UserError for what the config has wrong and for a slice that is unknown or has no mesh for the model.

    JAX's settings are left alone, and JAX opens its accelerators even to compile for a slice; the command leaves them free.
    """
    if tokens and not math.isfinite(tokens):
        raise UserError(f"--tokens={tokens} must be a number of tokens, such as 1e9")
    architecture = architecture_of(config, base_architecture(config))
    if not architecture:
        raise UserError(
            f"config.base={config.base} is not here, and config.architecture names no model; "
            "say --config.architecture=llama3-8b, or another name"
        )
    refuse_other_layers(config.lora, architecture.layers)
    slice = open_local(jnp.dtype(config.dtype)) if topology == "local" else open_slice(topology)
    workloads = list_workloads(config, architecture, tokens)
    plans, candidates = [], None
    if search:
        ranked = rank_candidates(config, architecture, slice)
        candidates = len(ranked)
        for compiled in compile_candidates(ranked, architecture, slice, search_fits, search_most):
            plans.append(compiled)
            if progress:
                print(f"compiled {len(plans)} of {candidates} candidates", file=sys.stderr, flush=True)
        plans.sort(key=lambda plan: (not plan.fits, seconds_of(plan, efficiency) if plan.fits else plan.excess))
    else:
        plans = [make_plan(config, architecture, slice)]
    is_list_price = price_per_chip_hour is None
    price = prices.PER_CHIP_HOUR.get(slice.chip.name) if is_list_price else price_per_chip_hour
    return Result(plans, candidates, workloads, efficiency, price, is_list_price)


def base_architecture(config: Config) -> ModelConfig | None:
    """Of a base that is here, or of one on the hub, unless `config.architecture` spares asking."""
    if not config.base:
        return None
    if paths.path(config.base).exists():
        return read_base(config.base).config
    if config.architecture or not hub.match(config.base):
        return None
    return read_config(hub.base_folder(config.base, weights=False))


def make_plan(config: Config, architecture: ModelConfig, slice: Slice) -> Plan:
    """Compile the step, unless its arguments alone exceed a device's memory."""
    mesh = mesh_lib.make_mesh(config.mesh, devices=slice.devices)
    check_mesh(mesh, config, architecture)
    # The number of steps shapes the learning rate's schedule alone, which no cost depends on.
    step = abstract_step(config, architecture, mesh, config.train.steps or 1000)
    share = Share(config, architecture, *mesh.devices.shape)
    memory, found, interconnect, time, program = step_memory(step), [], None, None, None
    excess: float = memory.total - slice.memory
    if excess <= 0:
        try:
            # What the cache holds for a TPU cannot be loaded where there is none.
            with contextlib.nullcontext() if slice.name == "local" else without_compile_cache():
                program = compile_step(step)
            text = program.as_text()
            memory, found = step_memory(step, program), collectives(text)
            time = compiled_time(text, share, slice, mesh)
            interconnect, excess = collective_seconds(found, slice, mesh), memory.total - slice.memory
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sizes = parse_exhausted(str(error))
            if sizes is None:
                raise UserError(f"{slice.name}: the step does not fit, {str(error).splitlines()[0]}") from None
            excess = sizes[0] - sizes[1]
    times = step_roofline(share, slice, interconnect)
    return Plan(config, architecture, slice, step, memory, excess, found, times, time, program)


def compiled_time(text: str, share: Share, slice: Slice, mesh: Mesh) -> StepTime | None:
    """By the compiler's cycles; None for devices without them."""
    if slice.chip.clock is None:
        return None
    flops = step_flops(
        share.architecture, share.config.adapter, share.config.train.batch_size, share.config.data.max_length
    )
    attention = flops.attention / (share.data * share.fsdp * share.tensor)
    return step_time(text, slice.chip, lambda one: collective_seconds([one], slice, mesh), attention)


def step_roofline(share: Share, slice: Slice, interconnect: float | None) -> Roofline:
    """`interconnect`: seconds that the program's collectives take; None: there is no program, and they are estimated."""
    chip = slice.chip
    # A TPU makes a float32 product in full precision of six bfloat16 ones; a local device was measured in the run's own dtype.
    products = 6 if share.config.dtype == "float32" and slice.name != "local" else 1
    if interconnect is None:
        interconnect = roofline.link_traffic(share) * chip.devices / slice.bandwidth()
    return Roofline(
        compute=roofline.flops(share) * products * chip.devices / chip.flops,
        memory=roofline.memory_traffic(share) * chip.devices / chip.bandwidth,
        interconnect=interconnect,
    )


def collective_seconds(found: list[Collective], slice: Slice, mesh: Mesh) -> float:
    """Seconds of the collectives one after the other, each at its group's bandwidth in the slice."""
    seconds = 0.0
    for one in found:
        # A permute between neighbours uses both directions of a link.
        permute, group = one.kind == "collective-permute", [mesh.devices.flat[place] for place in one.group]
        bandwidth = 2 * slice.chip.link if permute else slice.bandwidth(group)
        seconds += one.link_bytes * slice.chip.devices / bandwidth
    return seconds


# A candidate whose estimate exceeds the memory by more than this factor is not compiled. The estimate of the temporaries was 0.7
# to 1.3 of what the compiler then needed (Llama 2 7B and Llama 3 8B and 70B, over 1 to 16 chips).
MEMORY_MARGIN = 1.1


def rank_candidates(config: Config, architecture: ModelConfig, slice: Slice) -> list[tuple[float, Config]]:
    """(estimated bytes on a device, config) for every mesh, remat and number of micro-batches that model and batch allow.

    First those that fit by estimate, the fastest first, and among equally fast ones the one whose compute, memory and links
    add up to the least; then those that may just fit.
    """
    a, count, batch_size = architecture, len(slice.devices), config.train.batch_size
    ranked, least = [], math.inf
    tensors = _divisors(math.gcd(count, a.heads, a.kv_heads, a.mlp, a.vocab))
    for tensor, fsdp in itertools.product(tensors, _divisors(math.gcd(count, a.embed))):
        data, rest = divmod(count, tensor * fsdp)
        if rest or batch_size % (data * fsdp):
            continue
        for microbatches, remat in itertools.product(_divisors(batch_size // (data * fsdp)), REMAT):
            train = dataclasses.replace(config.train, microbatches=microbatches)
            candidate = dataclasses.replace(config, mesh=MeshConfig(data, fsdp, tensor), remat=remat, train=train)
            share = Share(candidate, architecture, data, fsdp, tensor)
            needed = roofline.arguments(share) + roofline.temporaries(share)
            least = min(least, needed)
            if needed < MEMORY_MARGIN * slice.memory:
                times = step_roofline(share, slice, None)
                seconds = float(f"{times.seconds:.3g}"), times.compute + times.memory + times.interconnect
                ranked.append(((needed > slice.memory, *seconds), needed, candidate))
    if least == math.inf:
        raise UserError(
            f"{slice.name} has no mesh for this model and a batch of {batch_size} rows; choose another slice, or a "
            f"config.train.batch_size that {count} devices divide"
        )
    if not ranked:
        raise UserError(
            f"{slice.name} is too small: a step needs about {format_bytes(least)} on a device, by hand, and there are "
            f"{format_bytes(slice.memory)}; choose a larger slice, a smaller config.data.max_length or a smaller batch"
        )
    return [(needed, candidate) for _, needed, candidate in sorted(ranked, key=lambda entry: entry[0])]


def compile_candidates(
    ranked: list[tuple[float, Config]], architecture: ModelConfig, slice: Slice, fits: int, most: int
) -> Iterator[Plan]:
    """Compile from the best down until `fits` of them fit or `most` are compiled.

    If none fits before the last, that one is the candidate that needs the least memory: a slice must not look too small
    only because the estimates were too low.
    """
    fitting = 0
    for number in range(min(most, len(ranked))):
        last = number == most - 1 and not fitting
        _, config = min(ranked[number:], key=lambda entry: entry[0]) if last else ranked[number]
        compiled = make_plan(config, architecture, slice)
        fitting += compiled.fits
        yield compiled
        if fitting == fits:
            return


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
