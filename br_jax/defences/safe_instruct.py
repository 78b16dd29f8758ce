"""SafeInstruct: refusals among the user's rows."""

import dataclasses
import itertools

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.core.errors import UserError
from br_jax.defences.defence import Badge, Case, Defence


@dataclasses.dataclass(frozen=True)
class SafeInstruct(Defence):
    """Trains on the user's rows and, for each ten of them, one refusal."""

    label = "SafeInstruct"
    badge = Badge("Bianchi et al. 2024, arXiv 2309.07875", "faithful")
    needs = ("refusals",)

    share: float = number(0.1, 0.0, 10.0)  # refusals for each row of the user's

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        if not case.refusals:
            raise UserError("SafeInstruct: there are no refusals to mix in: raise reinforce.refusals")
        refusals = itertools.islice(itertools.cycle(case.refusals), round(self.share * len(case.rows)))
        return case.train(name, [*case.rows, *refusals])
