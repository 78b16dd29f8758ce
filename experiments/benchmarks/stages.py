"""A user's step without Buffer (SFT) and with it, folded into the base or stacked beside the trained adapter."""

from benchmarks.inputs import Setup
from benchmarks.report import Case
from benchmarks.training import BEST, describe, ours


def cases(setup: Setup) -> list[Case]:
    """The protocol's step at its best; a Buffer of the same rank."""
    return [
        Case(
            "stages",
            f"the user stage's step of {describe(setup)}",
            [
                ours("SFT", setup, **BEST),
                ours("Buffer, folded", setup, buffer=True, frozen="fold", **BEST),
                ours("Buffer, stacked", setup, buffer=True, frozen="stack", **BEST),
            ],
            "token",
        )
    ]
