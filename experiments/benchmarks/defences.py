"""A step of every rival with an objective of its own, against plain SFT's: what `docs/defences.md` counts in passes."""

from benchmarks.inputs import Setup
from benchmarks.report import Case
from benchmarks.training import BEST, describe, ours
from br_jax.defences.registry import DEFENCES
from br_jax.training.step import Objective

_AT_ONCE = 3  # rivals of a case, whose processes are all there together


def cases(setup: Setup) -> list[Case]:
    """SFT and a few rivals each. What a rival asks for beside the user's rows are the same rows again."""
    rivals = [name for name, kind in DEFENCES.items() if issubclass(kind, Objective)]
    return [
        Case(
            f"defences {', '.join(names)}",
            f"a step of {describe(setup)}; of Booster, Vaccine and Security Vector the provider's",
            [ours("SFT", setup, **BEST), *(ours(name, setup, rival=name, **BEST) for name in names)],
            "token",
        )
        for names in (rivals[i : i + _AT_ONCE] for i in range(0, len(rivals), _AT_ONCE))
    ]
