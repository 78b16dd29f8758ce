"""How long a turn's rows are: the choice between waste and waiting, made anew each turn."""

from collections.abc import Sequence

# What long rows may cost the others: as much as half of the turns that these would have had without them.
_SURCHARGE = 0.5


class Schedule:
    """Chooses the length of the next turn among a few, each a program of its own.

    A turn costs as much as all its slots' rows at its length, used or not. A slot whose next row is longer than the
    turn waits. The length that computes the most real tokens for its cost is taken, but no slot waits longer than
    `patience` says: so many turns that giving in to it makes the other slots at most half as slow again.
    """

    def __init__(self, lengths: Sequence[int], slots: int):
        """`lengths` ascend."""
        self.lengths, self._waited = tuple(lengths), [0] * slots

    def choose(self, needs: Sequence[int]) -> int:
        """The length of the next turn.

        Args:
            needs: tokens of each slot's next row, 0 for a slot without one; at least one slot has one.
        """
        fits = [self.fitting(need) if need else 0 for need in needs]
        asked = sorted({length for length in fits if length})

        def worth(length: int) -> float:
            return sum(need for need, fit in zip(needs, fits, strict=True) if fit <= length) / length

        best = max(asked, key=worth)
        for slot, fit in enumerate(fits):
            if self._waited[slot] >= self.patience(best, fit):
                best = max(best, fit)
        self._waited = [(n + 1) * (fit > best) for n, fit in zip(self._waited, fits, strict=True)]
        return best

    def fitting(self, need: int) -> int:
        """The least length that holds a row of so many tokens."""
        return next(length for length in self.lengths if length >= need)

    def patience(self, short: int, long: int) -> int:
        """How many turns a row of one length waits where turns of another are worth more."""
        return -int(-(long - short) / (_SURCHARGE * short) // 1)
