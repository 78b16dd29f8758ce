"""What a compiled program does in a call, from its text: products, bytes to and from memory, collectives.

XLA's own `cost_analysis` counts a loop's body once; here a body counts as often as it runs. Kernels that are no HLO
(Pallas) count for the bytes that they are given and give, and for no product.
"""

import collections
import functools
import itertools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)"
)
_CALLEES = re.compile(r"(calls|to_apply|body|condition|\w*computations?)=(%?[\w.\-]+|\{[^{}]*\})")
_ARRAY = re.compile(r"(?:[a-z]+(?P<bits>\d+)\w*|pred)\[(?P<shape>[\d,]*)\](?P<layout>\{[^{}]*\})?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WINDOWED = {"_ag": "all-gather in pieces", "_rs": "reduce-scatter in pieces"}
# What moves nothing, or is counted elsewhere: where it starts, or in its body.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_SLICES, _UPDATES = ("dynamic-slice", "slice", "gather"), ("dynamic-update-slice",)
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota", "async-update"}


class Instruction(NamedTuple):
    """A line of the text."""

    name: str
    type: str  # of its result: an array, or a tuple of them
    op: str
    operands: tuple[str, ...]
    line: str


class Work(NamedTuple):
    """Of one call, on one chip."""

    flops: float  # of products
    memory: float  # bytes between memory and cores
    collectives: dict[str, dict[str, int]]  # kind -> {"calls", "bytes"}, bytes as they reach a chip, on a ring

    @property
    def received(self) -> int:
        """Bytes from other chips."""
        return sum(kind["bytes"] for kind in self.collectives.values())


class Computation(NamedTuple):
    """A function of the text: its instructions by name, in order."""

    instructions: dict[str, Instruction]
    root: str

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read one's result."""
        return [one for one in self.instructions.values() if name in one.operands]

    def parameter(self, index: int) -> str:
        """The name of an argument."""
        mark = f" parameter({index})"
        return next(one.name for one in self.instructions.values() if mark in one.line)


def count_work(hlo: str) -> Work:
    """The sums over a call, from `compiled.as_text()`."""
    program = _read(hlo)
    times = _executions(hlo, program)
    fused = {callee for one in _all(program) if one.op == "fusion" for callee in _called(one)}
    flops = memory = 0
    for name, computation in program.items():
        for one in computation.instructions.values():
            flops += times[name] * _flops(one, computation)
            memory += 0 if name in fused else times[name] * _moved(one, computation, program)
    collectives = _collectives(program, times, fused)
    return Work(flops, memory + sum(kind["bytes"] for kind in collectives.values()), collectives)


def _read(hlo: str) -> dict[str, Computation]:
    program, name, lines = {}, "", {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[2], {}
            program[name] = Computation(lines, "")
        elif name and (match := _INSTRUCTION.match(line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", match["rest"].split(")")[0]))
            lines[match["name"]] = Instruction(match["name"], match["type"], match["op"], operands, line)
            if match["root"]:
                program[name] = Computation(lines, match["name"])
    return program


def _all(program):
    return itertools.chain.from_iterable(computation.instructions.values() for computation in program.values())


def _called(one: Instruction) -> list[str]:
    return [name for _, callees in _CALLEES.findall(one.line) for name in re.findall(r"[\w.\-]+", callees)]


def _executions(hlo: str, program: dict[str, Computation]) -> dict[str, int]:
    """How often each computation runs in a call of the module."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1]
    callers = collections.defaultdict(list)
    for name, computation in program.items():
        for one in computation.instructions.values():
            for role, callees in _CALLEES.findall(one.line):
                factor = _trip_count(one.line, program) if role == "body" else 1
                for callee in re.findall(r"[\w.\-]+", callees):
                    callers[callee].append((name, factor))

    @functools.cache
    def count(name: str) -> int:
        return 1 if name == entry else sum(factor * count(caller) for caller, factor in callers[name])

    return {name: count(name) for name in program}


def _trip_count(line: str, program: dict[str, Computation]) -> int:
    """How often a while loop runs: as XLA noted it, or its counter's bound by its increment; else once."""
    if known := re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', line):
        return int(known[1])
    condition, body = (program[re.search(rf"{role}=%?([\w.\-]+)", line)[1]] for role in ("condition", "body"))

    def scalars(computation: Computation, op: str) -> list[Instruction]:
        return [one for one in computation.instructions.values() if one.op == op and re.match("[su]32\\[\\]", one.type)]

    bounds, counters = scalars(condition, "constant"), scalars(condition, "get-tuple-element")
    if len(bounds) != 1 or len(counters) != 1:
        return 1
    index = int(re.search(r"index=(\d+)", counters[0].line)[1])
    results = body.instructions[body.root].operands if body.root else ()
    added = body.instructions.get(results[index]) if results else None
    steps = [body.instructions[name] for name in added.operands if name in body.instructions] if added else []
    step = next((_constant(one) for one in steps if one.op == "constant"), 1)
    return -(-_constant(bounds[0]) // step)


def _constant(one: Instruction) -> int:
    return int(re.search(r"constant\((\d+)\)", one.line)[1])


# -- products ----------------------------------------------------------------------------------------------------------


def _flops(one: Instruction, computation: Computation) -> float:
    """2 a multiplication and addition; a TPU's compiler writes every product as a convolution."""
    if one.op not in ("dot", "convolution"):
        return 0
    sides = [_shapes(computation.instructions[name].type)[0] for name in one.operands]
    result = math.prod(_shapes(one.type)[0])
    if one.op == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.line)[1]
        return 2 * result * math.prod(sides[0][int(axis)] for axis in summed.split(",") if axis)
    left, kernel, _ = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line).groups()
    summed = sides[1][kernel.index("i")]
    for axis, window in zip(sorted(filter(str.isdigit, kernel)), _windows(one.line), strict=False):
        size = window["size"]
        extent = _shapes(one.type)[0][re.search(r"->(\w+)", one.line)[1].index(axis)]
        places = (sides[0][left.index(axis)] - 1) * window["lhs_dilate"]
        reads = (
            out * window["stride"] + k * window["rhs_dilate"] - window["pad"]
            for out in range(extent)
            for k in range(size)
        )
        summed *= sum(0 <= at <= places and at % window["lhs_dilate"] == 0 for at in reads) / extent
    return 2 * result * summed


def _windows(line: str) -> list[dict[str, int]]:
    """Of each spatial axis of a convolution."""
    found = re.search(r"window=\{([^}]*)\}", line)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    axes = len(fields.get("size", "").split("x")) if found else 0
    defaults = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    each = {name: fields.get(name, "x".join([value] * axes)).split("x") for name, value in defaults.items()}
    return [{name: int(values[i].split("_")[0]) for name, values in each.items()} for i in range(axes)]


def _shapes(type: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in match["shape"].split(",") if n) for match in _ARRAY.finditer(type)]


# -- memory ------------------------------------------------------------------------------------------------------------


def _moved(one: Instruction, computation: Computation, program: dict[str, Computation]) -> float:
    """Bytes that an instruction outside of a fusion reads from memory and writes to it.

    Those of a collective are written as they arrive, and counted there.
    """
    if one.op in _FREE or one.op.endswith("-done") or _is_collective(one):
        return 0
    if one.op == "copy-start":  # its result is (target, source, ...)
        return _bytes(one.type)
    if one.op == "slice-start":  # ((source), target, ...)
        return _whole(one.type.split("), ", 1)[1])
    body = _body(one, program) if one.op == "fusion" else None
    read = sum(_read_bytes(name, i, one, computation, body, program) for i, name in enumerate(one.operands))
    return read + _written(one, computation, body)


def _is_collective(one: Instruction) -> bool:
    """Also what carries one on through the fusions that it overlaps with."""
    carried = one.op == "custom-call" and "AsyncCollective" in one.line
    return carried or one.op.removesuffix("-start") in _COLLECTIVES


def _body(one: Instruction, program: dict[str, Computation]) -> Computation | None:
    return next((program[name] for name in _called(one) if name in program), None)


def _written(one: Instruction, computation: Computation, body: Computation | None) -> float:
    root = body.instructions[body.root] if body else one
    inside = body or computation
    parts = [inside.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0
    for part in parts:
        while part.op == "bitcast":
            part = inside.instructions[part.operands[0]]
        if body and (part.op == "parameter" or _is_collective(part)):
            continue
        size = _bytes(part.type)
        if size and part.op in _UPDATES:
            size = _whole(inside.instructions[part.operands[1]].type)
        total += size
    return min(total, _bytes(one.type)) if body else total


def _read_bytes(name: str, index: int, one: Instruction, computation: Computation, body, program) -> float:
    """Of an operand: all of it, or the slices that are taken of it."""
    operand = computation.instructions[name].type
    if not _bytes(operand):
        return 0
    if body is None:
        if one.op in _SLICES and index == 0:
            return _whole(one.type)
        return 0 if one.op in _UPDATES and index == 0 else _bytes(operand)
    return min(_taken(body, body.parameter(index), program), _bytes(operand))


def _taken(body: Computation, name: str, program: dict[str, Computation]) -> float:
    """Bytes of a fusion's argument that it looks at."""
    total = 0
    for user in body.users(name):
        if user.op == "bitcast":
            total += _taken(body, user.name, program)
        elif user.op in _SLICES and user.operands[0] == name:
            total += _whole(user.type)
        elif user.op == "tuple" or _is_collective(user) or (user.op in _UPDATES and user.operands[0] == name):
            continue  # it passes on, or what is behind an update stays
        elif user.op == "fusion" and (inner := _body(user, program)):
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            total += max(_taken(inner, inner.parameter(i), program) for i in places)
        else:
            return _whole(body.instructions[name].type)
    return total


def _bytes(type: str) -> int:
    """Of a type's arrays that lie in memory, not near the cores (S(1), ...)."""
    arrays = _ARRAY.finditer(type)
    return sum(_size(match) for match in arrays if not re.search(r"S\([1-9]", match["layout"] or ""))


def _whole(type: str) -> int:
    return sum(_size(match) for match in _ARRAY.finditer(type))


def _size(match: re.Match) -> int:
    return max(1, int(match["bits"] or 8) // 8) * math.prod(int(n) for n in match["shape"].split(",") if n)


# -- between chips -----------------------------------------------------------------------------------------------------


def _collectives(program: dict[str, Computation], times: dict[str, int], fused: set[str]) -> dict[str, dict[str, int]]:
    """Sums by kind.

    What a TPU shows in every fusion that it overlaps with, under one channel id, counts once, where it is started.
    "... in pieces" is what the compiler took apart into permutes between slices.
    """
    by_key = {}
    for name, computation in program.items():
        for one in computation.instructions.values():
            kind = one.op.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            received = _received(kind, one.type, one.line)
            if kind == "collective-permute" and (window := re.search(r"windowed_dot_general_body(_ag|_rs)", name)):
                kind = _WINDOWED[window[1]]
            channel = re.search(r"channel_id=\d+", one.line) if name in fused else None
            key, found = channel[0] if channel else (name, one.name), (times[name], kind, received)
            by_key[key] = min(found, by_key.get(key, found))  # a fusion that it overlaps may run more often
    sums = collections.defaultdict(lambda: {"calls": 0, "bytes": 0})
    for count, kind, received in by_key.values():
        if count and received:
            sums[kind]["calls"] += count
            sums[kind]["bytes"] += count * received
    return dict(sorted(sums.items()))


def _received(kind: str, type: str, line: str) -> int:
    """Bytes that one execution brings to a chip."""
    sizes, chips = [_size(match) for match in _ARRAY.finditer(type)], 1
    # The chips that take part together, from any of HLO's three ways to write replica groups.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        chips = math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        chips = int(iota[1])
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        chips = len(listed[1].split(","))
    if kind == "collective-permute":
        return max(sizes)
    if kind == "reduce-scatter":
        return min(sizes) * (chips - 1)
    total = {"all-gather": max(sizes), "all-reduce": 2 * sum(sizes), "all-to-all": sum(sizes)}[kind]
    return round(total * (1 - 1 / chips))
