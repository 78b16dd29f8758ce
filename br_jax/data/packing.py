"""Packed batches: a step's rows side by side, in as few rows of one static length as they need.

Packing changes the layout of a step, never its rows. Step i has the rows of the padded run's step i
(`batches.make_batches` with the same seed), and there are as many steps. So its loss (the mean over its answer
tokens), the weight of each row in it and the learning rate are those of the padded run, and both runs follow one
trajectory up to the order of floating-point sums, dropout masks aside. A packed stream, whose steps take as many rows
as fit, would change the schedule and each row's weight; it is not built.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import grain
import numpy as np

from br_jax.data.batches import Batch, Example, Rows, in_steps, with_targets

# A batch is packed in the thread that asks for it.
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

# A batch's arrays, by Grain's names.
_ARRAYS = {
    "tokens": "tokens",
    "targets": "targets",
    "weights": "weights",
    "positions": "tokens_positions",
    "segment_ids": "tokens_segment_ids",
}


def make_packed_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    length: int,
    multiple: int = 1,
    epochs: int | None = None,
    steps: int | None = None,
    rows: Rows | None = None,
) -> grain.MapDataset:
    """The batches of `make_batches`, packed; element i is the batch of step i, always the same one.

    All steps are packed once beforehand, by their lengths alone, so that two row counts serve the whole run and each
    process knows them: see `row_counts`. Packing saves most where `batch_size` is many times `multiple`.

    Args:
        examples: of `encode_rows`.
        batch_size: examples of a step, over all processes.
        seed: of the shuffle, 0 <= seed < 2**32.
        length: T, the tokens of a packed row.
        multiple: what a batch's row count is a multiple of, so that a mesh and micro-batches can split it.
        epochs: passes over the examples; one when steps is not given either.
        steps: the number of batches instead.
        rows: which (packed) rows of every batch to give; None gives all.

    Returns:
        A Grain dataset whose `len()` is the number of steps and whose elements are dicts of numpy arrays
        [rows, T], as in `make_batches`, but with segment_ids 1, 2, ... for the examples of a row, and
        positions that begin at 0 in each; 0 is padding, which stands at the end of a row.

    Raises:
        ValueError: when an example is longer than `length`, or both epochs and steps are given.
    """
    order = functools.partial(in_steps, batch_size=batch_size, seed=seed, epochs=epochs, steps=steps)

    def count(some: Sequence[Example]) -> int:
        return -(-len(_pack(some, length)) // multiple) * multiple

    needed = order([{"tokens": example["tokens"]} for example in examples], count)
    # By index: iterating over a Grain dataset would start its threads, which have nothing to wait for here.
    counts = row_counts(needed[step] for step in range(len(needed)))
    parts = {n: slice(None) if rows is None else rows(n) for n in counts}
    assemble = functools.partial(_collate, length=length, parts=parts)
    return order([with_targets(example) for example in examples], assemble)


def row_counts(needed: Iterable[int]) -> tuple[int, ...]:
    """The row counts that a run is compiled for: the most that any step needs, and one less than that if it helps.

    The second is the one that leaves the fewest rows over all steps. A third would save less, and the step is compiled
    once for each.

    Args:
        needed: rows that each step needs.

    Returns:
        One or two counts, ascending.
    """
    times = Counter(needed)
    most = max(times)

    def rows(low: int) -> int:
        return sum(n * (low if count <= low else most) for count, n in times.items())

    return tuple(sorted({min(times, key=rows), most}))


def _pack(examples: Sequence[dict], length: int) -> list[dict]:
    """Rows of packed examples, by first-fit decreasing: the longest first, each in the first row that has room."""
    longest_first = sorted(examples, key=lambda example: -len(example["tokens"]))
    rows = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(longest_first).to_iter_dataset(_INLINE),
        length_struct=dict.fromkeys(examples[0], length),
        num_packing_bins=len(examples),  # so there is always room, and all examples are packed together
        shuffle_bins=False,
    )
    return list(rows)


def _collate(examples: Sequence[dict], *, length: int, parts: dict) -> Batch:
    """Packs a step's examples, adds empty rows up to the next of the counts, and returns the rows asked for of it."""
    packed = _pack(examples, length)
    rows = next(count for count in sorted(parts) if count >= len(packed))
    batch = {}
    for name, key in _ARRAYS.items():
        values = np.stack([row[key] for row in packed])
        values = np.pad(values, [(0, rows - len(packed)), (0, 0)])
        batch[name] = values[parts[rows]]
    return batch
