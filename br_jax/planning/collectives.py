"""Which collectives a compiled program runs in one call, and the bytes they bring to a chip, read from its HLO text."""

import collections
import functools
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(r"(calls|to_apply|body|condition|\w*computations?)=(%?[\w.\-]+|\{[^{}]*\})")
_COLLECTIVE = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"(?:[a-z]+(\d+)|pred)\[([\d,]*)\]")
_WINDOWED = {"_ag": "all-gather in pieces", "_rs": "reduce-scatter in pieces"}


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Sums over a call: kind -> {"calls", "bytes"}, bytes as they reach a chip, on a ring.

    A loop's body counts as often as the loop runs. An asynchronous collective of a TPU appears in every fusion that it
    overlaps with, under one channel id: it is counted once, where it is started. A kind is the HLO's; "... in pieces"
    when the compiler took it apart into permutes between slices of a matmul.

    Args:
        hlo: `compiled.as_text()`, of a TPU or a CPU.
    """
    bodies, times = _executions(hlo)
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", hlo))
    by_key = {}
    for name, lines in bodies.items():
        for line in lines:
            if not (match := _COLLECTIVE.search(line)):
                continue
            kind, received = match["kind"], _received(match["kind"], match["result"], line)
            if kind == "collective-permute" and (window := re.search(r"windowed_dot_general_body(_ag|_rs)", name)):
                kind = _WINDOWED[window[1]]
            channel = re.search(r"channel_id=\d+", line) if name in fused else None
            key = channel[0] if channel else (name, line)
            one = times[name], kind, received
            by_key[key] = min(one, by_key.get(key, one))  # a fusion that it overlaps may run more often
    sums = collections.defaultdict(lambda: {"calls": 0, "bytes": 0})
    for count, kind, received in by_key.values():
        if count and received:
            sums[kind]["calls"] += count
            sums[kind]["bytes"] += count * received
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

    @functools.cache
    def count(name: str) -> int:
        return 1 if name == entry else sum(factor * count(caller) for caller, factor in callers[name])

    return bodies, {name: count(name) for name in bodies}


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a while loop runs: as XLA noted it, or its counter's bound by its increment; else once."""
    if known := re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', line):
        return int(known[1])
    condition, body = ("\n".join(bodies[re.search(rf"{role}=%?([\w.\-]+)", line)[1]]) for role in ("condition", "body"))
    bounds = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", condition)
    counters = re.findall(r" [su]32\[\]\S* get-tuple-element\(.*index=(\d+)", condition)
    if len(bounds) != 1 or len(counters) != 1:
        return 1
    root = re.search(r"ROOT \S+ = .* tuple\((.*?)\)", body)
    results = re.findall(r"%?[\w.\-]+(?=,|$)", re.sub(r"/\*.*?\*/", "", root[1])) if root else []
    counter = results[int(counters[0])] if results else ""
    added = re.search(rf"{re.escape(counter)} = [su]32\[\]\S* add\([^,]+, (%?[\w.\-]+)\)", body)
    step = added and re.search(rf"{re.escape(added[1])} = [su]32\[\]\S* constant\((\d+)\)", body)
    return -(-int(bounds[0]) // int(step[1] if step else 1))


def _received(kind: str, result: str, line: str) -> int:
    """Bytes that one execution brings to a chip; `result` is its arrays, as HLO writes them."""
    arrays = [(int(bits or 8), [int(n) for n in shape.split(",") if n]) for bits, shape in _ARRAY.findall(result)]
    sizes = [max(1, bits // 8) * math.prod(shape) for bits, shape in arrays]
    # The chips that take part together, from any of HLO's three ways to write replica groups.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        chips = math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        chips = int(iota[1])
    else:
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
        chips = len(listed[1].split(",")) if listed else 1
    if kind == "collective-permute":
        return max(sizes)
    if kind == "reduce-scatter":
        return min(sizes) * (chips - 1)
    total = {"all-gather": max(sizes), "all-reduce": 2 * sum(sizes), "all-to-all": sum(sizes)}[kind]
    return round(total * (1 - 1 / chips))
