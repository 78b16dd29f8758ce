"""Which collectives a compiled program runs in one call, and the bytes they bring to a chip, read from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(r"(calls|to_apply|body|condition|\w*computations?)=(%?[\w.\-]+|\{[^{}]*\})")
_COLLECTIVE = re.compile(
    r" = (?P<shape>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")
_WINDOWED = {"_ag": "all-gather in pieces", "_rs": "reduce-scatter in pieces"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: the HLO's; "... in pieces" when the compiler took it apart into permutes between slices of a matmul.
        shape: of its (largest) result, as HLO writes it.
        received: bytes that reach a chip in one execution, on a ring.
        times: executions in one call of the program.
    """

    kind: str
    shape: str
    received: int
    times: int


def find_collectives(hlo: str) -> list[Collective]:
    """Reads every collective of an optimized HLO module.

    A loop's body counts as often as the loop runs. An asynchronous collective of a TPU appears in every fusion that it
    overlaps with, under one channel id: it is counted once, where it is started.

    Args:
        hlo: `compiled.as_text()`, of a TPU or a CPU.
    """
    bodies, times = _executions(hlo)
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", hlo))
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            if (match := _COLLECTIVE.search(line)) and times[name]:
                new = _collective(match["kind"], match["shape"], line, name, times[name])
                channel = re.search(r"channel_id=(\d+)", line) if name in fused else None
                key = channel[1] if channel else f"{name} {line}"
                if key not in found or new.times < found[key].times:  # a fusion that it overlaps may run more often
                    found[key] = new
    return [one for one in found.values() if one.received]


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Sums over a call: kind -> {"calls", "bytes"}, bytes as they reach a chip."""
    sums = collections.defaultdict(lambda: {"calls": 0, "bytes": 0})
    for one in collectives:
        sums[one.kind]["calls"] += one.times
        sums[one.kind]["bytes"] += one.times * one.received
    return dict(sorted(sums.items()))


def _executions(hlo: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """(lines of each computation, how often each one runs in a call of the module)."""
    bodies, entry, name = {}, "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    callers = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            for role, callees in _CALLEES.findall(line):
                factor = _trip_count(line, bodies) if role == "body" else 1
                for callee in re.findall(r"[\w.\-]+", callees):
                    callers[callee].append((name, factor))
    times = {entry: 1}

    def count(name: str) -> int:
        if name not in times:
            times[name] = sum(factor * count(caller) for caller, factor in callers[name])
        return times[name]

    return bodies, {name: count(name) for name in bodies}


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a while loop runs: as XLA noted it, or its counter's bound by its increment; else once."""
    if known := re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', line):
        return int(known[1])
    condition, body = ("\n".join(bodies[re.search(rf"{role}=%?([\w.\-]+)", line)[1]]) for role in ("condition", "body"))
    bound = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", condition)
    counter = re.findall(r" [su]32\[\]\S* get-tuple-element\(.*index=(\d+)", condition)
    if len(bound) != 1 or len(counter) != 1:
        return 1
    step = 1
    if root := re.search(r"ROOT \S+ = .* tuple\((.*?)\)", body):
        name = re.findall(r"%?[\w.\-]+(?=,|$)", re.sub(r"/\*.*?\*/", "", root[1]))[int(counter[0])]
        if added := re.search(rf"{re.escape(name)} = [su]32\[\]\S* add\([^,]+, (%?[\w.\-]+)\)", body):
            value = re.search(rf"{re.escape(added[1])} = [su]32\[\]\S* constant\((\d+)\)", body)
            step = int(value[1]) if value else 1
    return -(-int(bound[0]) // step)


def _collective(kind: str, shape: str, line: str, computation: str, times: int) -> Collective:
    arrays = [(f"{dtype}[{sizes}]", _size(dtype, sizes)) for dtype, sizes in _ARRAY.findall(shape)]
    largest = max(arrays, key=lambda array: array[1])
    if kind == "collective-permute":
        window = re.search(r"windowed_dot_general_body(_ag|_rs)", computation)
        return Collective(_WINDOWED[window[1]] if window else kind, largest[0], largest[1], times)
    others = 1 - 1 / _group_size(line)
    received = {
        "all-gather": largest[1] * others,
        "all-reduce": 2 * sum(size for _, size in arrays) * others,
        "reduce-scatter": min(size for _, size in arrays) * (_group_size(line) - 1),
        "all-to-all": sum(size for _, size in arrays) * others,
    }[kind]
    return Collective(kind, largest[0], round(received), times)


def _size(dtype: str, sizes: str) -> int:
    return _BYTES.get(dtype, 8) * math.prod(int(n) for n in sizes.split(",") if n)


def _group_size(line: str) -> int:
    """Chips that take part together, from any of HLO's three ways to write replica groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return 1
