"""A step time predicted from what a compiled program does and published peaks.

It is a bound that no step can beat, not a measurement. A call takes at least as long as the slowest of three: its FLOPs
at the peak of the matrix units, the bytes between memory and cores at the memory's rate, the bytes from other chips at
the links' rate. docs/pods.md has the formulas.
"""

import dataclasses
from typing import NamedTuple

from br_jax.models.decoder import saved_names
from br_jax.planning.hlo import Work
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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one call on each chip, were only that resource the limit, and the bound that they make."""

    compute: float  # FLOPs, those of rematerialization with them
    memory: float  # bytes between memory and cores
    links: float  # bytes from other chips
    seconds: float  # the slowest of these
    mfu: float  # FLOPs without rematerialization, by those that the chips could do in that time

    @property
    def bound(self) -> str:
        """Which of the three."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def predict(program: Program, work: Work, chip: Chip, chips: int) -> Prediction:
    """The roofline of one call, of which each of the chips does `work`."""
    compute = (work.flops + _kernel_flops(program) / chips) / chip.flops
    memory, links = work.memory / chip.hbm_rate, work.received / chip.ici_rate
    bound = max(compute, memory, links)
    return Prediction(compute, memory, links, bound, model_flops(program) / chips / chip.flops / bound)


def model_flops(program: Program) -> float:
    """FLOPs of a call: 2 a matmul weight and token forward, and back, for a frozen base has no gradient of weights.

    Attention's two matmuls see half of the context on average when whole rows run. Adapters are left out (r / D of the
    rest), and so are logits, which are made for a few tokens only, unless it decodes.
    """
    spec, decodes = program.decoder.spec, program.stage == "decode"
    weights = spec.num_layers * sum(a * b for a, b in spec.kernel_shapes.values())
    head = 2 * spec.vocab_size * spec.embed_dim if decodes else 0
    forward = program.tokens * (2 * weights + head) + _attention_flops(program)
    return forward * (2 if program.stage in TRAINING else 1)


def _attention_flops(program: Program) -> float:
    spec, seen = program.decoder.spec, 1 if program.stage == "decode" else 0.5
    return program.tokens * spec.num_layers * 4 * spec.num_heads * spec.head_dim * program.context * seen


def _kernel_flops(program: Program) -> float:
    """Of attention's kernels, which are no HLO: two products forward, five back, and again those that remat repeats."""
    if program.attention != "splash":
        return 0
    forward = 1 + (program.stage in TRAINING and "attention" not in saved_names(program.decoder.remat))
    return _attention_flops(program) * (forward + 2.5 * (program.stage in TRAINING))
