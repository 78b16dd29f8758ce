"""RESTA and LoX: the alignment direction is added once more, after or before the user is trained."""

import dataclasses

from br_jax.adapters.diagnostics import best_rank
from br_jax.adapters.lora import Adapter, scaled, stack
from br_jax.core.bounds import RANK, number
from br_jax.defences.defence import Badge, Case, Defence


@dataclasses.dataclass(frozen=True)
class Resta(Defence):
    """After plain SFT, adds the safety vector."""

    label = "RESTA"
    badge = Badge("Bhardwaj et al. 2024, arXiv 2402.11746", "simplified", "no DARE; the vector is what align has added")
    needs = ("direction",)

    strength: float = number(0.5, 0.0, 100.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return stack([user, scaled(case.direction(), self.strength)])


@dataclasses.dataclass(frozen=True)
class Lox(Defence):
    """Trains on a base that is extrapolated along the alignment direction of a low rank, which stays in."""

    label = "LoX"
    badge = Badge(
        "Perin et al. 2025, arXiv 2506.15606", "variant", "rank and strength are those of a guide to its code"
    )
    needs = ("direction",)

    strength: float = number(1.25, 0.0, 100.0)
    rank: int = number(6, *RANK)

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, frozen={"align": self._added(case)})

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return stack([user, self._added(case)])

    def _added(self, case: Case) -> Adapter:
        return scaled(best_rank(case.direction(), self.rank)[0], self.strength)
