"""XLA's text of a compiled program, cut into computations and instructions; how often a loop runs.

The text is optimized HLO (`jit(f).lower(…).compile().as_text()`), of CPUs, TPUs and GPUs alike. It has the body of a scan once.
"""

import dataclasses
import functools
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) (([a-z][\w\-]*)\(.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    is_root: bool
    name: str
    result: str  # its type, as text
    rest: str  # opcode, operands and attributes, as text
    opcode: str

    def attribute(self, pattern: str) -> str:
        """The first group of the pattern; empty where it does not match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Its origin in the traced program, as `jit(train_step)/…/q_proj/dot_general`."""
        return self.attribute(r'op_name="([^"]*)"')

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """The computations that it calls, by the attribute that names them."""
        return dict(_CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        names = _BRANCHES.search(self.rest)
        return re.findall(r"[\w.\-]+", names[1]) if names else list(self.called.values())


class Program:
    """`computations`: by name, instructions by name, in the order in which they run. ValueError for text that is no program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = Instruction(bool(found[1]), *found.groups()[1:])
        if not self.entry:
            raise ValueError("this is no HLO text: it has no ENTRY computation")

    def root(self, computation: str) -> Instruction:
        return next(one for one in reversed(self.computations[computation].values()) if one.is_root)

    def trips(self, loop: Instruction, caller: str) -> int:
        """As XLA says, or from the counter's start, its limit (the condition is `counter < limit`) and its step."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition, body = loop.called["condition"], loop.called["body"]
        try:
            compare = self.root(condition)
            if compare.opcode != "compare" or "direction=LT" not in compare.rest:
                raise LookupError
            counter, limit = (self._source(condition, operand) for operand in compare.operands)
            place = int(counter.attribute(r"index=(\d+)"))
            start = self._source(caller, self._source(caller, loop.operands[0]).operands[place])
            addition = self._source(body, self.root(body).operands[place])
            (step,) = [i for i in (self._source(body, o) for o in addition.operands) if i.opcode == "constant"]
            first, end, stride = (int(i.attribute(r"constant\((\d+)\)")) for i in (start, limit, step))
        except (LookupError, ValueError):
            raise ValueError(f"how often does the loop {loop.name} run? Its counter is not understood") from None
        return -(-(end - first) // stride)

    def _source(self, computation: str, name: str) -> Instruction:
        """What makes the value `name`, behind copies."""
        by_name = self.computations[computation]
        while by_name[name].opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            name = by_name[name].operands[0]
        return by_name[name]
