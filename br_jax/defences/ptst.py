"""PTST, pure tuning and safe testing: no safety prompt while the user is trained, one when the model is used."""

import dataclasses

from br_jax.defences.defence import Badge, Defence


@dataclasses.dataclass(frozen=True)
class Ptst(Defence):
    """Plain SFT, and a safety instruction in front of every prompt afterwards."""

    label = "PTST"
    badge = Badge(
        "Lyu et al. 2024, arXiv 2402.18540", "variant", "the instruction is ours, and stands in the user's turn"
    )

    instruction: str = "You are a careful assistant. Refuse what your guidelines do not allow, and help with all else."
