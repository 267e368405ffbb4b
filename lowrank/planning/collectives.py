"""A compiled program's text -> its collectives: kind, shapes, who takes part, how often, and the bytes over a chip's links.

The text is XLA's optimized HLO (`jit(f).lower(…).compile().as_text()`), for CPUs and TPUs alike. Its one idea: a walk from
the entry that multiplies by the trips of every loop on the way, because the text has the body of a scan once. Of a
conditional, the branch with the most bytes counts, which makes the result an upper bound.

What the text has more than once, and counts once: a TPU spreads one asynchronous gather over several fusions, all with the
same channel in the same computation; a `-start` has its `-done`.
Left out: what runs at the same time as what. Bytes are those of ring algorithms, whatever the machine really does.
"""

import dataclasses
import functools
import math
import re

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # others: bits at the name's end

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\d*[a-z]*\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program. `times` is how often a step runs it, loops multiplied."""

    kind: str  # one of KINDS
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of every array that comes out of it
    group: tuple[int, ...]  # of the first group: places in the mesh's `devices.flat`; of a permute, the first pair
    times: int
    op_name: str  # where it comes from in the traced program, as `jit(train_step)/…/q_proj/dot_general`
    name: str  # of the instruction in the text
    channel: str | None  # a number that only instructions of the same collective share

    @property
    def result_bytes(self) -> float:
        """Of what comes out of it on one chip, once."""
        return sum(dtype_bytes(dtype) * math.prod(dimensions) for dtype, dimensions in self.shapes)

    @property
    def link_bytes(self) -> float:
        """What one chip sends in all its `times`, by a ring over the group."""
        n = len(self.group)
        share = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # of the result, a part of n
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
            "collective-permute": float(n > 1),
            "collective-broadcast": float(n > 1),
        }[self.kind]
        return self.times * self.result_bytes * share


def collectives(text: str) -> list[Collective]:
    """All that one run of the program does, in the order of the walk. ValueError for text that cannot be understood."""
    program = _Program(text)
    return [dataclasses.replace(one, times=times) for one, times in program.walk(program.entry)]


def totals(found: list[Collective]) -> dict[str, tuple[int, float]]:
    """kind -> (how many a step runs, bytes that one chip sends for them), the most bytes first."""
    table: dict[str, tuple[int, float]] = {}
    for one in found:
        times, sent = table.get(one.kind, (0, 0.0))
        table[one.kind] = (times + one.times, sent + one.link_bytes)
    return dict(sorted(table.items(), key=lambda entry: -entry[1][1]))


def dtype_bytes(dtype: str) -> float:
    """Of one element, from XLA's name: f32, bf16, s8, f8e4m3fn, pred."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    return int(re.match(r"[a-z]+(\d+)", dtype)[1]) / 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str  # its type, as text
    rest: str  # operands and attributes, as text

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def channel(self) -> str | None:
        return self.attribute(r"channel_id=(\d+)")

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


class _Program:
    """The text, cut into computations; `walk` follows what calls what."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        current: list[_Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                opcode = _OPCODE.search(" " + found[2])
                if opcode:
                    at = opcode.start()
                    current.append(_Instruction(found[1], opcode[1], found[2][:at], found[2][at:]))
        if not self.entry:
            raise ValueError("this is no HLO text: it has no ENTRY computation")

    @functools.cache  # noqa: B019 (a program lives as long as its walk)
    def walk(self, computation: str) -> list[tuple[Collective, int]]:
        """What one run of the computation does: (a collective of one time, how often)."""
        found, inner = {}, []
        for kind, instruction, times in self._in_order(computation):
            if kind:
                found.setdefault(instruction.channel or instruction.name, (_collective(kind, instruction), 1))
            else:
                inner += [(parts, count * times) for parts, count in instruction]
        # An asynchronous gather that begins here may go on inside a loop of this computation: it is still one.
        return [*found.values(), *((parts, count) for parts, count in inner if parts.channel not in found)]

    def _in_order(self, computation: str):
        """Of a computation and of the fusions in it: (kind, its instruction, 1), or (None, a walk, how often it runs)."""
        for instruction in self.computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            called = dict(_CALLED.findall(instruction.rest))
            if kind in KINDS:
                yield kind, instruction, 1
            elif instruction.opcode == "fusion":
                scattered = called["calls"].startswith("all-reduce-scatter")  # how a TPU writes a reduce-scatter
                for kind, inner, times in self._in_order(called["calls"]):
                    if scattered and kind == "all-reduce":
                        yield "reduce-scatter", dataclasses.replace(inner, result=instruction.result), times
                    else:
                        yield kind, inner, times
            elif instruction.opcode == "while":
                body = self.walk(called["body"])
                if body:
                    yield None, body, self._trips(instruction, computation)
            elif instruction.opcode in ("call", "async-start"):
                yield None, self.walk(called.get("to_apply") or called["calls"]), 1
            elif instruction.opcode == "conditional":
                names = _BRANCHES.search(instruction.rest)
                branches = re.findall(r"[\w.\-]+", names[1]) if names else [*called.values()]
                walks = [self.walk(branch) for branch in branches]
                yield None, max(walks, key=lambda walk: sum(one.link_bytes * times for one, times in walk)), 1

    def _trips(self, loop: _Instruction, caller: str) -> int:
        """As XLA says, or from the counter's start, its limit (the condition is `counter < limit`) and its step."""
        said = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if said:
            return int(said)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        body = loop.attribute(r"body=%?([\w.\-]+)")
        try:
            compare = self.computations[condition][-1]
            if compare.opcode != "compare" or "direction=LT" not in compare.rest:
                raise LookupError
            counter, limit = (self._source(condition, operand) for operand in compare.operands)
            place = int(counter.attribute(r"index=(\d+)"))
            start = self._source(caller, self._source(caller, loop.operands[0]).operands[place])
            step = self._source(body, self.computations[body][-1].operands[place])
            (step,) = [i for i in (self._source(body, o) for o in step.operands) if i.opcode == "constant"]
            first, limit, step = (int(i.attribute(r"constant\((\d+)\)")) for i in (start, limit, step))
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"how often does the loop {loop.name} run? Its counter is not understood") from None
        return -(-(limit - first) // step)

    def _source(self, computation: str, name: str) -> _Instruction:
        """What makes the value `name`, behind copies."""
        by_name = {instruction.name: instruction for instruction in self.computations[computation]}
        while by_name[name].opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            name = by_name[name].operands[0]
        return by_name[name]


def _collective(kind: str, instruction: _Instruction) -> Collective:
    shapes = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(instruction.result)
    ]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (what goes in, what comes out, counters of the hardware)
        shapes = [shape for shape in shapes if shape != ("u32", ())]
        shapes = shapes[len(shapes) // 2 :]
    op_name = instruction.attribute(r'op_name="([^"]*)"') or ""
    group = _group(kind, instruction)
    return Collective(kind, tuple(shapes), group, 1, op_name, instruction.name, instruction.channel)


def _group(kind: str, instruction: _Instruction) -> tuple[int, ...]:
    """The first group of devices that take part together; of a permute, the first pair of two different ones."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=\{(.*?\})\}") or "")
        moved = [(int(source), int(target)) for source, target in pairs if source != target]
        return moved[0] if moved else (int(pairs[0][0]),)
    if text := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(int(device) for device in text.split(","))
    if text := instruction.attribute(r"replica_groups=(\[[^ ]*)"):  # [groups,size]<=[dimensions]T(order)
        shape, ids = text.rstrip(",").split("<=")
        return tuple(_iota(ids).reshape([int(size) for size in re.findall(r"\d+", shape)])[0].tolist())
    if text := instruction.attribute(r"replica_groups=(mesh\[[^}]*\})"):
        return _mesh_group(text)
    raise ValueError(f"the devices of {instruction.name} are not said in a way that is known: {instruction.rest[:300]}")


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
    devices = devices.reshape([*axes.values()])
    places = np.zeros((1, len(axes)), int)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]):
        size, before = int(size or axes[name]), int(before or 1)
        stride = axes[name] // (before * size)
        steps = np.zeros((size, len(axes)), int)
        steps[:, [*axes].index(name)] = np.arange(size) * stride
        places = (places[:, None] + steps[None]).reshape(-1, len(axes))
    return tuple(devices[tuple(places.T)].tolist())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
