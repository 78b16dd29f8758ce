"""How long the rows of a pool step are: the choice between waste and waiting, made anew each step; and its batch."""

from collections.abc import Sequence

import numpy as np

from br_jax.training.batching import packed_unit, padded_lengths
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import Taken

# What long rows may cost the others: as much as half of the steps that these would have had without them.
_SURCHARGE = 0.5
_SHARES = (0.1, 0.5, 0.9, 1.0)  # of the first jobs' rows, that fit each length
_GROWTH = 1.4  # from one longer length to the next


class Schedule:
    """Chooses the length of the next pool step among a few, each a program of its own.

    A step costs as much as all its slots' rows at its length, used or not. A slot whose next row is longer waits. The
    length that computes the most real tokens for its cost is taken, but no slot waits longer than `patience` says: so
    many steps that giving in to it makes the other slots at most half as slow again.
    """

    def __init__(self, lengths: Sequence[int], slots: int):
        """`lengths` ascend."""
        self.lengths, self._waited = tuple(lengths), [0] * slots

    def choose(self, needs: Sequence[int]) -> int:
        """The length of the next step.

        Args:
            needs: tokens of each slot's next row, 0 for a slot without one; at least one slot has one.
        """
        fits = [next(length for length in self.lengths if length >= need) if need else 0 for need in needs]

        def worth(length: int) -> float:
            return sum(need for need, fit in zip(needs, fits, strict=True) if fit <= length) / length

        best = max(sorted(set(fits) - {0}), key=worth)
        for slot, fit in enumerate(fits):
            if self._waited[slot] >= self.patience(best, fit):
                best = max(best, fit)
        self._waited = [(n + 1) * (fit > best) for n, fit in zip(self._waited, fits, strict=True)]
        return best

    def patience(self, short: int, long: int) -> int:
        """How many steps a row of one length waits where steps of another are worth more."""
        return -int(-(long - short) / (_SURCHARGE * short) // 1)


def step_shapes(config: TrainConfig, on: str) -> tuple[tuple[int, ...], int]:
    """(The lengths that a pool step may have, ascending; its rows of a slot); of packed rows the longest alone."""
    rows = config.batch_size // config.accumulation
    if not config.packing:
        return padded_lengths(config), rows
    unit, most = packed_unit(on), min(config.packing, rows * config.max_length)
    return (-(-most // unit) * unit,), 1


def fitting_lengths(needs: Sequence[int], most: int, on: str) -> tuple[int, ...]:
    """Lengths of pool steps, ascending, for packed rows of so many tokens, and longer ones up to `most` for others."""
    needs, unit = sorted(needs), packed_unit(on)
    fitting = [needs[int(share * (len(needs) - 1))] for share in _SHARES]
    while fitting[-1] < most:
        fitting.append(min(int(_GROWTH * fitting[-1]) + 1, most))
    return tuple(sorted({min(-(-length // unit) * unit, most) for length in fitting}))


def fill(taken: Sequence[Taken | None], length: int, rows: int) -> dict[str, np.ndarray]:
    """The batch of a pool step, [slots x rows, length]: each slot's rows together, the rest padding."""
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32) | {"weights": np.float32}
    batch = {name: np.zeros((len(taken) * rows, length), kind) for name, kind in kinds.items()}
    batch["piece"] = np.zeros(len(taken) * rows, np.int32)
    for slot, each in enumerate(taken):
        for i, row in enumerate(each.rows if each else ()):
            for name in kinds:
                batch[name][slot * rows + i, : len(row[name])] = row[name]
            batch["piece"][slot * rows + i] = each.first + i
    return batch
