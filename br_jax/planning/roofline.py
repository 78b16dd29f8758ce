"""What a call costs: the collectives of a compiled program, and a step time predicted from published peaks.

The prediction is a bound that no step can beat, not a measurement. A call takes at least as long as the slowest of
three: its FLOPs at the peak of the matrix units, the bytes between memory and cores at the memory's rate, the bytes
from other chips at the links' rate. docs/pods.md has the formulas.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import NamedTuple

from br_jax.models.decoder import saved_names
from br_jax.planning.programs import TRAINING, Program

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(r"(calls|to_apply|body|condition|\w*computations?)=(%?[\w.\-]+|\{[^{}]*\})")
_COLLECTIVE = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"(?:[a-z]+(\d+)|pred)\[([\d,]*)\]")
_WINDOWED = {"_ag": "all-gather in pieces", "_rs": "reduce-scatter in pieces"}


class Chip(NamedTuple):
    """Published peaks of one chip."""

    flops: float  # bf16, a second
    hbm_bytes: int
    hbm_rate: float  # bytes a second between memory and cores
    ici_rate: float  # bytes a second that reach the chip over all its links to other chips (as many may leave it)


# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "System architecture", read in November 2026. Links between chips
# are published in Gbit/s: 2400, 1600, 4800, 3584.
CHIPS = {
    "v4": Chip(275e12, 32 << 30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 << 30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 << 30, 1640e9, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one call on each chip, were only that resource the limit, and the bound that they make."""

    compute: float  # FLOPs, those of rematerialization with them
    memory: float  # bytes between memory and cores
    links: float  # bytes from other chips
    seconds: float  # the slowest of these
    mfu: float  # FLOPs without rematerialization, by those that the chips could do in that time


def predict(program: Program, chip: Chip, chips: int, received: int, tensor: int = 1) -> Prediction:
    """The roofline of one call on chips that share the work evenly, each of which gets so many bytes from others.

    Each matmul reads its weight and input and writes its output once in each pass; decoding also reads the cache.
    `tensor` parts of a weight stay apart; over other axes it is gathered: written once and read once.
    """
    spec, width, (passes, repeated) = program.decoder.spec, program.dtype.itemsize, _passes(program)
    needed = model_flops(program) / chips / chip.flops
    weights = spec.num_params * width / tensor * (2 if chips > tensor else 1)
    streams = spec.num_layers * sum(a + b for a, b in spec.kernel_shapes.values()) * width
    per_key = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width if program.stage == "decode" else 0
    cache = program.batch * program.context * per_key / chips
    compute = needed * repeated / passes
    memory = (repeated * (weights + program.tokens / chips * streams) + cache) / chip.hbm_rate
    links = received / chip.ici_rate
    bound = max(compute, memory, links)
    return Prediction(compute, memory, links, bound, needed / bound)


def model_flops(program: Program) -> float:
    """FLOPs of a call: 2 a matmul weight and token forward, and back, for a frozen base has no gradient of weights.

    Attention's two matmuls see half of the context on average when whole rows run. Adapters are left out (r / D of the
    rest), and so are logits, which are made for a few tokens only, unless it decodes.
    """
    spec, decodes = program.decoder.spec, program.stage == "decode"
    weights = spec.num_layers * sum(a * b for a, b in spec.kernel_shapes.values())
    attention = spec.num_layers * 4 * spec.num_heads * spec.head_dim * program.context * (1 if decodes else 0.5)
    head = 2 * spec.vocab_size * spec.embed_dim if decodes else 0
    return program.tokens * (2 * weights + attention + head) * _passes(program)[0]


def _passes(program: Program) -> tuple[int, float]:
    """Forward passes' worth of matmuls: those that the model needs, and with those that rematerialization repeats.

    A layer's last one, "down", is never repeated: nothing in the layer needs its output.
    """
    if program.stage not in TRAINING:
        return 1, 1
    sizes = {name: a * b for name, (a, b) in program.decoder.spec.kernel_shapes.items()}
    kept = {*saved_names(program.decoder.remat), "down"}
    return 2, 2 + sum(size for name, size in sizes.items() if name not in kept) / sum(sizes.values())


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Sums over a call, from `compiled.as_text()`: kind -> {"calls", "bytes"}, bytes as they reach a chip, on a ring.

    A loop's body counts as often as it runs; what a TPU shows in every fusion that it overlaps with, under one channel
    id, once, where it is started. "... in pieces" is what the compiler took apart into permutes between slices.
    """
    bodies, times = _executions(hlo)
    fused, by_key = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", hlo)), {}
    for name, line in ((name, line) for name, lines in bodies.items() for line in lines):
        if not (match := _COLLECTIVE.search(line)):
            continue
        kind, received = match["kind"], _received(match["kind"], match["result"], line)
        if kind == "collective-permute" and (window := re.search(r"windowed_dot_general_body(_ag|_rs)", name)):
            kind = _WINDOWED[window[1]]
        channel = re.search(r"channel_id=\d+", line) if name in fused else None
        key, one = channel[0] if channel else (name, line), (times[name], kind, received)
        by_key[key] = min(one, by_key.get(key, one))  # a fusion that it overlaps may run more often
    sums = collections.defaultdict(lambda: {"calls": 0, "bytes": 0})
    for count, kind, received in by_key.values():
        if count and received:
            sums[kind]["calls"] += count
            sums[kind]["bytes"] += count * received
    return dict(sorted(sums.items()))


def _executions(hlo: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """(lines of each computation, how often each one runs in a call of the module)."""
    bodies, callers, entry, name = {}, collections.defaultdict(list), "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    for name, line in ((name, line) for name, lines in bodies.items() for line in lines):
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
    counter = re.escape(results[int(counters[0])]) if results else ""
    added = re.search(rf"{counter} = [su]32\[\]\S* add\([^,]+, (%?[\w.\-]+)\)", body)
    step = added and re.search(rf"{re.escape(added[1])} = [su]32\[\]\S* constant\((\d+)\)", body)
    return -(-int(bounds[0]) // int(step[1] if step else 1))


def _received(kind: str, result: str, line: str) -> int:
    """Bytes that one execution brings to a chip; `result` is its arrays, as HLO writes them."""
    arrays = [(int(bits or 8), [int(n) for n in shape.split(",") if n]) for bits, shape in _ARRAY.findall(result)]
    sizes, chips = [max(1, bits // 8) * math.prod(shape) for bits, shape in arrays], 1
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
