"""A predicted step time from published peaks: a bound that no step can beat, not a measurement.

A call takes at least as long as the slowest of three: its FLOPs at the peak of the matrix units, the bytes between
memory and cores at the memory's rate, the bytes from other chips at the links' rate. The formulas are in
docs/pods.md; the bytes from other chips are those of the compiled program.
"""

import dataclasses

from br_jax.models.decoder import saved_names
from br_jax.planning.chips import Chip
from br_jax.planning.programs import Program


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one call on each chip, were only that resource the limit; `mfu` at the slowest of them.

    Attributes:
        compute: FLOPs, those of rematerialization with them.
        memory: bytes between memory and cores.
        links: bytes from other chips.
        mfu: FLOPs that the model needs (rematerialization not counted) by those that the chips could do in that time.
    """

    compute: float
    memory: float
    links: float
    mfu: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute, self.memory, self.links)


def predict(program: Program, chip: Chip, chips: int, received: int, tensor: int = 1) -> Prediction:
    """The roofline of one call.

    Args:
        program: what runs.
        chip: its peaks.
        chips: that share the work evenly.
        received: bytes that reach a chip from others.
        tensor: parts that each weight is split in for good; over other axes it is gathered.
    """
    needed = model_flops(program)
    compute = needed * _passes(program) / _model_passes(program) / chips / chip.flops
    memory = _memory_bytes(program, chips, tensor) / chip.hbm_rate
    bound = max(compute, memory, received / chip.ici_rate)
    return Prediction(compute, memory, received / chip.ici_rate, needed / chips / chip.flops / bound)


def model_flops(program: Program) -> float:
    """FLOPs of a call: 2 a matmul weight and token forward, as many again for a frozen base's backward pass.

    The base's weights get no gradient, so training costs 4 N a token, not 6 N. Attention's two matmuls see half of the
    context on average when whole rows run; adapters are left out (r / D of the rest).
    """
    spec = program.spec
    weights = spec.num_layers * sum(a * b for a, b in spec.kernel_shapes.values())
    share = 1 if program.stage == "decode" else 0.5
    attention = spec.num_layers * 4 * spec.num_heads * spec.head_dim * program.context * share
    heads = 1.0 if program.stage == "decode" else 0.0  # elsewhere logits are made for a few tokens only
    forward = program.tokens * (2 * weights + attention + heads * 2 * spec.vocab_size * spec.embed_dim)
    return forward * _model_passes(program)


def _model_passes(program: Program) -> float:
    return 2 if program.trains else 1


def _passes(program: Program) -> float:
    """Forward passes' worth of matmuls, with those that rematerialization repeats.

    A layer's last one, "down", is never repeated: nothing in the layer needs its output.
    """
    if not program.trains:
        return 1
    sizes = {name: a * b for name, (a, b) in program.spec.kernel_shapes.items()}
    kept = {*saved_names(program.remat), "down"}
    return 2 + sum(size for name, size in sizes.items() if name not in kept) / sum(sizes.values())


def _memory_bytes(program: Program, chips: int, tensor: int) -> float:
    """Bytes a chip moves: each matmul reads its weight and its input and writes its output once in each pass.

    A gathered weight is written once and read once. Decoding also reads the cache.
    """
    spec = program.spec
    width = program.dtype_bytes
    weights = spec.num_params * width / tensor * (2 if chips > tensor else 1)
    streams = spec.num_layers * sum(a + b for a, b in spec.kernel_shapes.values()) * width
    activations = program.tokens / chips * streams
    cache = 0.0
    if program.stage == "decode":
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width
        cache = program.batch * program.context * per_token / chips
    return _passes(program) * (weights + activations) + cache
