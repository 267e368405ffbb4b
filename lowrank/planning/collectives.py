"""A compiled program's text -> its collectives: kind, shapes, who takes part, how often, and the bytes over a chip's links.

The program (planning/hlo.py) is walked from its entry, and every loop's trips are multiplied. Of a conditional, the branch with the
most bytes counts, which makes the result an upper bound. What the text repeats counts once: a TPU spreads one asynchronous
gather over several fusions with the same channel, and a `-start` has its `-done`.

Bytes are those of ring algorithms, whatever the machine uses; what overlaps with what is not considered.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from lowrank.planning.hlo import Instruction, Program

# kind -> bytes that a chip of a ring of n sends, over the bytes of its result
SENT_SHARE = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: n > 1,
    "collective-broadcast": lambda n: n > 1,
}

_ARRAY = re.compile(r"\b([a-z]\d*[a-z]*\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program. `times` is how often a step runs it, loops multiplied."""

    kind: str  # a key of SENT_SHARE
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of each array of its result
    group: tuple[int, ...]  # the first group, as places in the mesh's `devices.flat`; of a permute, the first pair
    times: int
    op_name: str  # its origin in the traced program, as `jit(train_step)/…/q_proj/dot_general`
    channel: str  # shared by the instructions of one collective: a number; of one that has none, its name in the text

    @property
    def result_bytes(self) -> float:
        """Of its result on one chip, once."""
        return sum(dtype_bytes(dtype) * math.prod(dimensions) for dtype, dimensions in self.shapes)

    @property
    def link_bytes(self) -> float:
        """Bytes that one chip sends in all its `times`, by a ring over the group."""
        return self.times * self.result_bytes * SENT_SHARE[self.kind](len(self.group))


def collectives(text: str) -> list[Collective]:
    """The collectives of one run of the program, in the order of the walk. ValueError for text that cannot be parsed."""
    program = Program(text)
    return _walk(program, program.entry, {})


def totals(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """kind -> (how many a step runs, bytes that one chip sends for them), the most bytes first."""
    table: dict[str, tuple[int, float]] = {}
    for one in found:
        times, sent = table.get(one.kind, (0, 0.0))
        table[one.kind] = (times + one.times, sent + one.link_bytes)
    return dict(sorted(table.items(), key=lambda entry: -entry[1][1]))


def dtype_bytes(dtype: str) -> float:
    """Of one element, from the bits in XLA's name: f32, bf16, s4, c64, f8e4m3fn; pred."""
    return 1 if dtype == "pred" else _numbers(dtype)[0] / 8


def _walk(program: Program, computation: str, known: dict[str, list[Collective]]) -> list[Collective]:
    """The collectives of one run of the computation; `known` has those of computations that were walked before."""
    if computation in known:
        return known[computation]
    own: dict[str, Collective] = {}
    inner: list[Collective] = []
    for instruction in _unfused(program, computation):
        kind, called = instruction.opcode.removesuffix("-start"), instruction.called
        if kind in SENT_SHARE:
            one = as_collective(kind, instruction)
            own.setdefault(one.channel, one)
        elif kind == "while":
            if body := _walk(program, called["body"], known):
                trips = program.trips(instruction, computation)
                inner += [dataclasses.replace(one, times=one.times * trips) for one in body]
        elif kind in ("call", "async"):
            inner += _walk(program, called.get("to_apply") or called["calls"], known)
        elif kind == "conditional":
            walks = [_walk(program, branch, known) for branch in instruction.branches]
            inner += max(walks, key=lambda walk: sum(one.link_bytes for one in walk))
    # An asynchronous gather that begins here may continue inside a loop of this computation: it is still one.
    known[computation] = [*own.values(), *(one for one in inner if one.channel not in own)]
    return known[computation]


def _unfused(program: Program, computation: str) -> Iterator[Instruction]:
    """The computation's instructions, fusions replaced by what they fuse."""
    for instruction in program.computations[computation].values():
        if instruction.opcode != "fusion":
            yield instruction
            continue
        fused = instruction.called["calls"]
        for inner in _unfused(program, fused):
            if fused.startswith("all-reduce-scatter") and inner.opcode == "all-reduce":  # a TPU's reduce-scatter
                inner = dataclasses.replace(inner, opcode="reduce-scatter", result=instruction.result)
            yield inner


def as_collective(kind: str, instruction: Instruction) -> Collective:
    shapes = [(dtype, tuple(_numbers(sizes))) for dtype, sizes in _ARRAY.findall(instruction.result)]
    # (arguments, results, counters of the hardware); a sum's arguments stand there since jax 0.12, in brackets of their own
    if instruction.opcode.endswith("-start") and (kind != "all-reduce" or instruction.result.startswith("((")):
        shapes = [shape for shape in shapes if shape != ("u32", ())]
        shapes = shapes[len(shapes) // 2 :]
    op_name, channel = instruction.op_name, instruction.attribute(r"channel_id=(\d+)")
    return Collective(kind, tuple(shapes), _group(kind, instruction), 1, op_name, channel or instruction.name)


def _group(kind: str, instruction: Instruction) -> tuple[int, ...]:
    """The first group of devices that take part together; of a permute, the first pair of two different ones."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=\{(.*?\})\}"))
        return next(((int(source), int(target)) for source, target in pairs if source != target), (int(pairs[0][0]),))
    if text := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(_numbers(text))
    if text := instruction.attribute(r"replica_groups=(\[[^ ]*)"):  # [groups,size]<=[dimensions]T(order)
        shape, ids = text.rstrip(",").split("<=")
        return tuple(_iota(ids).reshape(_numbers(shape))[0].tolist())
    if text := instruction.attribute(r"replica_groups=(mesh\[[^}]*\})"):
        return _mesh_group(text)
    raise ValueError(f"the devices of {instruction.name} are given in an unknown form: {instruction.rest[:300]}")


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)` -> the numbers 0 to 7, laid out as [2, 4], transposed, in a row."""
    sizes, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _mesh_group(text: str) -> tuple[int, ...]:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: the devices along the axes in braces, from the first one on.

    An axis in braces may be a part of one: `'b':(2)2` is of size 2, with 2 places of the axis before it.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    ids = re.search(r"device_ids=\(([^ ]*)\) ", text)
    devices = _iota(ids[1]) if ids else np.arange(math.prod(axes.values()))
    places = np.zeros(1, int)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]):
        size, inner = int(size or axes[name]), math.prod([*axes.values()][[*axes].index(name) + 1 :])
        stride = inner * axes[name] // (int(before or 1) * size)
        places = np.add.outer(places, np.arange(size) * stride).reshape(-1)
    return tuple(devices[places].tolist())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
