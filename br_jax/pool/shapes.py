"""The shapes that a turn may have, and its batch."""

from collections.abc import Sequence

import numpy as np

from br_jax.pool.jobs import Taken
from br_jax.training.config import TrainConfig

_SHARES = (0.1, 0.5, 0.9, 1.0)  # of the first jobs' rows, that fit each length
_GROWTH = 1.4  # from one longer length to the next


def turn_shapes(config: TrainConfig, on: str) -> tuple[tuple[int, ...], int]:
    """(The lengths that a turn may have, ascending; the rows of a slot in a turn); of packed rows the longest alone."""
    rows = config.batch_size // config.accumulation
    if not config.packing:
        shorter = (bucket for bucket in config.buckets if bucket < config.max_length)
        return tuple(sorted({*shorter, config.max_length})), rows
    unit, most = _unit(on), min(config.packing, rows * config.max_length)
    return (-(-most // unit) * unit,), 1


def fitting_lengths(needs: Sequence[int], most: int, on: str) -> tuple[int, ...]:
    """Lengths of turns, ascending, for packed rows of so many tokens, with longer ones up to `most` for others."""
    needs, unit = sorted(needs), _unit(on)
    lengths = [needs[int(share * (len(needs) - 1))] for share in _SHARES]
    while lengths[-1] < most:
        lengths.append(min(int(_GROWTH * lengths[-1]) + 1, most))
    return tuple(sorted({min(-(-length // unit) * unit, most) for length in lengths}))


def _unit(on: str) -> int:
    """What divides a packed row's length; a TPU's attention wants whole tiles."""
    return 128 if on == "tpu" else 32


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
