"""The shapes that a turn may have, and its batch."""

from collections.abc import Sequence

import numpy as np

from br_jax.pool.jobs import Taken
from br_jax.training.config import TrainConfig
from br_jax.training.run import lengths, packed_unit

_SHARES = (0.1, 0.5, 0.9, 1.0)  # of the first jobs' rows, that fit each length
_GROWTH = 1.4  # from one longer length to the next


def turn_shapes(config: TrainConfig, on: str) -> tuple[tuple[int, ...], int]:
    """(The lengths that a turn may have, ascending; the rows of a slot in a turn); of packed rows the longest alone."""
    rows = config.batch_size // config.accumulation
    if not config.packing:
        return lengths(config), rows
    unit, most = packed_unit(on), min(config.packing, rows * config.max_length)
    return (-(-most // unit) * unit,), 1


def fitting_lengths(needs: Sequence[int], most: int, on: str) -> tuple[int, ...]:
    """Lengths of turns, ascending, for packed rows of so many tokens, with longer ones up to `most` for others."""
    needs, unit = sorted(needs), packed_unit(on)
    fitting = [needs[int(share * (len(needs) - 1))] for share in _SHARES]
    while fitting[-1] < most:
        fitting.append(min(int(_GROWTH * fitting[-1]) + 1, most))
    return tuple(sorted({min(-(-length // unit) * unit, most) for length in fitting}))


def fill(taken: list[Taken | None], length: int, rows: int) -> dict[str, np.ndarray]:
    """The batch of a turn, [slots x rows, length]: each slot's rows together, the rest padding."""
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32) | {"weights": np.float32}
    batch = {name: np.zeros((len(taken) * rows, length), kind) for name, kind in kinds.items()}
    batch["piece"] = np.zeros(len(taken) * rows, np.int32)
    for slot, each in enumerate(taken):
        for i, row in enumerate(each.rows if each else ()):
            for name in kinds:
                batch[name][slot * rows + i, : len(row[name])] = row[name]
            batch["piece"][slot * rows + i] = each.first + i
    return batch
