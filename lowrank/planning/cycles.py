"""A step's time on a TPU by its compiler: the cycles that libtpu estimates for each instruction, by the parts of the model.

Every fusion in a TPU's program carries `estimated_cycles`, its cost model's figure, for one run. The program is walked from its
entry, loops multiplied by their trips, of a conditional the branch that costs the most. What carries no estimate is counted and
named: Pallas kernels are costed by their FLOPs, copies by their bytes; the rest is said to be unknown.

The ruler is off in known ways (docs/decisions.md), so each part has three times: the compiler's cycles; the floor of the same
instructions, the larger of FLOPs / peak and bytes / bandwidth; and a corrected one, in which a product takes no less than its
floor and another operation no more than its bytes at `REACHED` of the bandwidth.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lowrank.planning.chips import Chip
from lowrank.planning.collectives import SENT_SHARE, Collective, as_collective, dtype_bytes
from lowrank.planning.hlo import Instruction, Program

REACHED = 0.8  # of the bandwidth, by operations that only move memory
PALLAS_SHARE = (
    0.3  # of the peak, that attention's Pallas kernels are taken to reach: an assumption, no estimate is in the text
)

# A part of the model, and what in an instruction's origin (its op_name) belongs to it. The first that matches counts.
PARTS = (
    ("adapter", r"\.delta/|/lora_[ab]\b"),
    ("base products", r"_proj/(dot_general|transpose)$"),
    ("attention", r"/attend\b"),
    ("norms, rotary, silu", r"norm/|/rotary\b|/mlp/"),
    ("head and loss", r"\bloss\b"),
    ("embedding", r"/embed_tokens/|jit\(_take\)"),
    ("optimizer", r"^jit\(\w+\)/(?!while)"),
    ("kept and fetched", r"dynamic_(update_)?(slice|index)"),
    ("norms, rotary, silu", r"/self_attn/"),
)
OTHER = "copies, layouts, sums"

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")


class Part(NamedTuple):
    """What a step spends on a part of the model, on one device: seconds, FLOPs of products, bytes of HBM."""

    name: str
    seconds: float = 0.0  # by the compiler's cycles
    corrected: float = 0.0
    floor: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Part") -> "Part":
        return Part(self.name, *(mine + theirs for mine, theirs in zip(self[1:], other[1:], strict=True)))


class StepTime(NamedTuple):
    """A step by its parts, the most seconds first, and what its collectives add."""

    parts: tuple[Part, ...]
    hidden: float  # seconds of collectives while something is computed
    exposed: float  # seconds of collectives that nothing hides
    unknown: dict[str, int]  # what has no estimate and is not in the parts -> how often a step runs it

    @property
    def together(self) -> Part:
        return functools.reduce(Part.plus, self.parts, Part("together"))

    @property
    def seconds(self) -> float:
        return self.together.seconds + self.exposed

    @property
    def corrected(self) -> float:
        return self.together.corrected + self.exposed


def step_time(text: str, chip: Chip, link_seconds: Callable[[Collective], float], attention_flops: float) -> StepTime:
    """The time of a program on one of the chip's devices.

    `link_seconds`: of a collective, once. `attention_flops`: of a step on one device, for Pallas kernels, which together make
    all of it. ValueError for text that is not understood.
    """
    walk = _Walk(Program(text), chip, link_seconds)
    walk.run(walk.program.entry, 1)
    parts = dict(walk.parts)
    if pallas := [name for name in walk.unknown if name.startswith("pallas")]:
        for name in pallas:
            del walk.unknown[name]
        floor = attention_flops / walk.peak
        costed = Part("attention", floor / PALLAS_SHARE, floor / PALLAS_SHARE, floor, attention_flops)
        parts["attention"] = parts.get("attention", Part("attention")).plus(costed)
    ordered = tuple(sorted(parts.values(), key=lambda part: -part.seconds))
    return StepTime(ordered, walk.hidden, walk.exposed, dict(walk.unknown.most_common()))


class _Walk:
    """The sums over a program."""

    def __init__(self, program: Program, chip: Chip, link_seconds: Callable[[Collective], float]):
        assert chip.clock
        self.program, self.link_seconds = program, link_seconds
        self.hertz, self.peak, self.bandwidth = chip.clock, chip.flops / chip.devices, chip.bandwidth / chip.devices
        self.parts: dict[str, Part] = {}
        self.unknown: Counter[str] = Counter()
        self.hidden = self.exposed = 0.0
        self.bytes_read = functools.cache(self._bytes_read)
        self.cycles_of = functools.cache(self._cycles_of)
        self.flops_of = functools.cache(self._flops_of)

    def run(self, computation: str, times: int) -> None:
        """Add one computation, run so many times."""
        body = self.program.computations[computation]
        for one in body.values():
            if one.opcode == "while":
                self.run(one.called["body"], times * self.program.trips(one, computation))
            elif one.opcode == "call":
                self.run(one.called["to_apply"], times)
            elif one.opcode == "conditional":
                self.run(max(one.branches, key=self.cycles_of), times)
            elif cycles := _cycles(one):
                self.add(one, body, cycles, times)
            elif one.opcode == "copy" or (one.opcode == "fusion" and not self.has_collective(one)):
                self.add(one, body, 0, times)
            elif one.opcode == "custom-call" and (target := one.attribute(r'custom_call_target="([^"]*)"')):
                kind = "pallas " if target == "tpu_custom_call" else ""
                if target not in FREE:
                    self.unknown[kind + (one.name.rstrip(".0123456789") if kind else target)] += times
        self.add_collectives(body, times)

    def add(self, one: Instruction, body: dict[str, Instruction], cycles: int, times: int) -> None:
        moved = self.bytes_moved(one, body)
        flops = self.flops_of(one.called["calls"]) if one.opcode == "fusion" else _product_flops(one, body)
        floor = max(flops / self.peak, moved / self.bandwidth)
        seconds = cycles / self.hertz if cycles else moved / self.bandwidth / REACHED
        most = moved / self.bandwidth / REACHED or seconds  # what stays in VMEM has no traffic to be held against
        corrected = max(seconds, floor) if flops else min(seconds, most)
        name = self.part_of(one)
        part = Part(name, *(times * value for value in (seconds, corrected, floor, flops, moved)))
        self.parts[name] = self.parts.get(name, Part(name)).plus(part)

    # ---- Which part ------------------------------------------------------------------------------------------------

    def part_of(self, one: Instruction) -> str:
        """By the products that it holds, else by its own origin, else by the first origin within."""
        inner = list(self.inside(one))
        products = [each for each in inner if each.opcode in ("convolution", "dot")]
        origins = [each.op_name for each in products] or [one.op_name, *(each.op_name for each in inner)]
        for origin in origins:
            for name, pattern in PARTS:
                if re.search(pattern, origin):
                    if name != "base products":
                        return name
                    again, backward = "rematted_computation" in origin, "transpose(jvp" in origin
                    return f"{name}, {'again' if again else 'backward' if backward else 'forward'}"
        return "attention" if products and "/self_attn/" in origins[0] else OTHER

    def inside(self, one: Instruction):
        """What a fusion fuses, or the instruction itself."""
        if one.opcode != "fusion":
            yield one
            return
        for each in self.program.computations[one.called["calls"]].values():
            yield from self.inside(each)

    # ---- FLOPs, bytes ----------------------------------------------------------------------------------------------

    def _flops_of(self, computation: str) -> float:
        body = self.program.computations[computation]
        return sum(
            self.flops_of(one.called["calls"]) if one.opcode == "fusion" else _product_flops(one, body)
            for one in body.values()
        )

    def _cycles_of(self, computation: str) -> int:
        """Of one run, to choose a branch."""
        total = 0
        for one in self.program.computations[computation].values():
            total += _cycles(one)
            if one.opcode == "while":
                total += self.program.trips(one, computation) * self.cycles_of(one.called["body"])
            elif one.opcode == "call":
                total += self.cycles_of(one.called["to_apply"])
        return total

    def bytes_moved(self, one: Instruction, body: dict[str, Instruction]) -> float:
        """Of HBM, read and written."""
        if one.opcode != "fusion":
            return sum(_sizes(one.result)) + sum(
                sum(_sizes(body[name].result)) for name in one.operands if name in body
            )
        fused = one.called["calls"]
        total = sum(self.bytes_read(fused, place) for place in range(len(one.operands)))
        inner, root = self.program.computations[fused], self.program.root(fused)
        written = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for each, size in zip(written, _sizes(one.result), strict=False):
            each = inner[each.operands[0]] if each.opcode == "bitcast" else each
            in_place = each.opcode == "dynamic-update-slice"
            total += min(size, _sizes(inner[each.operands[1]].result, everywhere=True)[0]) if in_place else size
        return total

    def _bytes_read(self, computation: str, place: int) -> float:
        """Of HBM, that a fused computation reads of an operand: all of it, the slices that it takes, none where it writes."""
        body = self.program.computations[computation]
        own = next(
            one for one in body.values() if one.opcode == "parameter" and one.rest.startswith(f"parameter({place})")
        )
        return self.read_of(own, body) if sum(_sizes(own.result)) else 0

    def read_of(self, one: Instruction, body: dict[str, Instruction]) -> float:
        whole = sum(_sizes(one.result, everywhere=True))
        total = whole * one.is_root
        for user in body.values():
            for at, name in enumerate(user.operands):
                if name != one.name:
                    continue
                if user.opcode == "bitcast":
                    total += self.read_of(user, body)
                elif user.opcode in ("dynamic-slice", "slice"):
                    total += sum(_sizes(user.result, everywhere=True))
                elif user.opcode == "fusion":
                    total += self.bytes_read(user.called["calls"], at)
                elif user.opcode != "tuple" and (user.opcode, at) != ("dynamic-update-slice", 0):
                    return whole
        return min(total, whole)

    # ---- Collectives -----------------------------------------------------------------------------------------------

    def has_collective(self, one: Instruction) -> bool:
        return any(each.opcode.removesuffix("-start") in SENT_SHARE for each in self.inside(one))

    def add_collectives(self, body: dict[str, Instruction], times: int) -> None:
        """Each collective from its first to its last instruction in the computation: what is computed meanwhile hides it."""
        order = list(body.values())
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        found: dict[str, Collective] = {}
        starts: dict[str, str] = {}
        for place, one in enumerate(order):
            for each in self.inside(one):
                kind = each.opcode.removesuffix("-start")
                if kind in SENT_SHARE:
                    collective = as_collective(kind, each)
                    found.setdefault(collective.channel, collective)
                    first.setdefault(collective.channel, place)
                    last[collective.channel] = place
                    starts[one.name] = collective.channel
            if one.opcode.endswith("-done") and one.operands and one.operands[0] in starts:
                last[starts[one.operands[0]]] = place
        for channel, collective in found.items():
            seconds = self.link_seconds(collective)
            between = order[first[channel] + 1 : last[channel]]
            within = [order[first[channel]], order[last[channel]]] if first[channel] < last[channel] else []
            meanwhile = sum(self.seconds_of(one, body) for one in [*between, *within])
            self.hidden += times * min(seconds, meanwhile)
            self.exposed += times * max(0.0, seconds - meanwhile)

    def seconds_of(self, one: Instruction, body: dict[str, Instruction]) -> float:
        if one.opcode == "while":
            return _cycles(one) / self.hertz + self.cycles_of(one.called["body"]) / self.hertz
        return _cycles(one) / self.hertz


FREE = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")  # custom calls that compute nothing


def _cycles(one: Instruction) -> int:
    return int(one.attribute(r'"estimated_cycles":"(\d+)"') or 0)


def _sizes(result: str, everywhere: bool = False) -> list[float]:
    """Bytes of each array of a type; 0 where it lies in VMEM or SMEM, which its layout says as S(1) and higher."""
    return [
        dtype_bytes(dtype) * math.prod(map(int, filter(None, sizes.split(",")))) * (everywhere or "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(result)
    ] or [0.0]


def _product_flops(one: Instruction, body: dict[str, Instruction]) -> float:
    """Of a product, which a TPU writes as a convolution whose window may run over dimensions of the batch."""
    if one.opcode not in ("convolution", "dot"):
        return 0.0
    out, left, right = (_dimensions(text) for text in (one.result, *(body[name].result for name in one.operands[:2])))
    if one.opcode == "dot":
        summed = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in summed.split(",") if i)
    of_left, of_right, of_out = re.split("_|->", one.attribute(r"dim_labels=([\w>\-]+)"))
    count = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", one.attribute(r"window=\{([^}]*)\}")))
    for place, label in enumerate(sorted(label for label in of_out if label.isdigit())):
        stride, before, dilation, spread = (
            int(window[name].split("x")[place].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        at = np.arange(out[of_out.index(label)])[:, None] * stride - before
        at = at + np.arange(int(window["size"].split("x")[place])) * spread
        last = (left[of_left.index(label)] - 1) * dilation
        count *= np.count_nonzero((at >= 0) & (at <= last) & (at % dilation == 0))  # what is no padding
    return count


def _dimensions(result: str) -> list[int]:
    found = _ARRAY.search(result)
    return [int(size) for size in found[2].split(",") if size] if found else []
