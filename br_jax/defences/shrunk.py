"""What every defence has to beat: a part of the plain user's adapter."""

import dataclasses

from br_jax.adapters.lora import Adapter, scaled
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence


@dataclasses.dataclass(frozen=True)
class Shrunk(Defence):
    """After plain SFT, releases a part of it: a step back towards the aligned base."""

    label = "shrunk SFT"
    badge = Badge("", "own")

    factor: float = number(0.65, 0.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return scaled(user, self.factor)
