"""A predicted step time from published peaks: a bound that no step can beat, not a measurement.

A call takes at least as long as the slowest of three: its FLOPs at the peak of the matrix units, the bytes between
memory and cores at the memory's rate, the bytes from other chips at the links' rate. docs/pods.md has the formulas; the
bytes from other chips are those of the compiled program.
"""

import dataclasses
from typing import NamedTuple

from br_jax.models.decoder import saved_names
from br_jax.planning.programs import TRAINING, Program


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
# Dense bf16 FLOP a second by JAX's name of a device; of GPUs from NVIDIA's data sheets.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
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
    """The roofline of one call.

    Args:
        chips: that share the work evenly.
        received: bytes that reach a chip from others.
        tensor: parts that each weight is split in for good; over other axes it is gathered.
    """
    needed = model_flops(program) / chips / chip.flops
    passes, repeated = _passes(program)
    compute = needed * repeated / passes
    memory = _memory_bytes(program, chips, tensor) / chip.hbm_rate
    links = received / chip.ici_rate
    bound = max(compute, memory, links)
    return Prediction(compute, memory, links, bound, needed / bound)


def model_flops(program: Program) -> float:
    """FLOPs of a call: 2 a matmul weight and token forward, as many again for a frozen base's backward pass.

    The base's weights get no gradient, so training costs 4 N a token, not 6 N. Attention's two matmuls see half of the
    context on average when whole rows run. Adapters are left out (r / D of the rest), and so are logits, which are made
    for a few tokens only, unless it decodes.
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


def _memory_bytes(program: Program, chips: int, tensor: int) -> float:
    """Bytes a chip moves: each matmul reads its weight and its input and writes its output once in each pass.

    A gathered weight is written once and read once. Decoding also reads the cache.
    """
    spec, width = program.decoder.spec, program.dtype.itemsize
    weights = spec.num_params * width / tensor * (2 if chips > tensor else 1)
    streams = spec.num_layers * sum(a + b for a, b in spec.kernel_shapes.values()) * width
    per_key = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width if program.stage == "decode" else 0
    cache = program.batch * program.context * per_key / chips
    return _passes(program)[1] * (weights + program.tokens / chips * streams) + cache
