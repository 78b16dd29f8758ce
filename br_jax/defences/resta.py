"""RESTA and LoX: the alignment direction is added once more, after or before the user is trained."""

import dataclasses

from br_jax.adapters.lora import Adapter, scaled, stack
from br_jax.bounds import number
from br_jax.defences.defence import Badge, Case, Defence


@dataclasses.dataclass(frozen=True)
class Resta(Defence):
    """After plain SFT, adds the safety vector."""

    label = "RESTA"
    badge = Badge("Bhardwaj et al. 2024, arXiv 2402.11746", "simplified", "without DARE's dropping of entries")

    strength: float = number(0.5, 0.0, 100.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return stack([user, scaled(case.direction(), self.strength)])


@dataclasses.dataclass(frozen=True)
class Lox(Resta):
    """Trains on a base that is extrapolated along the alignment direction, which stays in."""

    label = "LoX"
    badge = Badge("Perin et al. 2025, arXiv 2506.15606", "variant", "no rank is chosen: the direction is an adapter's")

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, frozen={"align": scaled(case.direction(), self.strength)})
