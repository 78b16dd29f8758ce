"""Packed batches: a step's rows side by side in a few long rows, whose number is the run's and whose length fits.

Packing changes the layout of a step, never its rows. Step i has the rows of the padded run's step i
(`batches.make_batches` with the same seed), and there are as many steps. So its loss (the mean over its answer
tokens), the weight of each row in it and the learning rate are those of the padded run, and both runs follow one
trajectory up to the order of floating-point sums, dropout masks aside.

What all of a run's rows begin with (a template's header) stands once in each packed row, where every row sees it.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np

from br_jax.data.batches import SHARED, Batch, Example, RowSelector, in_steps, shared_prefix, with_targets

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
    unit: int = 128,
    share: bool = True,
    shapes: int = 3,
    epochs: int = 1,
    steps: int | None = None,
    rows: RowSelector | None = None,
) -> grain.MapDataset:
    """The batches of `make_batches`, packed; element i is the batch of step i, always the same one.

    All steps are packed once beforehand, by their lengths alone: the largest says how many packed rows every batch
    has, and a few lengths of them serve the whole run (see `row_lengths`), so that each process knows the shapes.

    Args:
        examples, batch_size, seed, epochs, steps: as in `make_batches`.
        length: the most tokens of a packed row. The longer, the less is left empty; attention over long rows is cheap
            where it skips what the segments hide ("blocked").
        multiple: what a batch's row count is a multiple of, so that a mesh and micro-batches can split it.
        unit: what a packed row's length is a multiple of, unless it is `length`.
        share: whether what all examples begin with is run once for all of a row; "splash" cannot.
        shapes: how many lengths serve the run.
        rows: which (packed) rows of every batch to give; None gives all.

    Returns:
        A Grain dataset whose `len()` is the number of steps and whose elements are dicts of numpy arrays
        [rows, T], as in `make_batches`, but with segment_ids 1, 2, ... for the examples of a row, and
        positions that begin at 0 in each, or go on behind the shared beginning, whose segment is `SHARED`; 0 is
        padding, which stands at the end of a row.

    Raises:
        ValueError: when an example is longer than `length`.
    """
    order = functools.partial(in_steps, batch_size=batch_size, seed=seed, epochs=epochs, steps=steps)
    head = _shared_head(examples, share)
    examples = [_behind(head, example) for example in examples]
    length, sizes = length - len(head), [{"tokens": example["tokens"]} for example in examples]

    def over_all_steps(measure: Callable[[Sequence[dict]], int]) -> list[int]:
        # By index: iterating over a Grain dataset would start its threads, which have nothing to wait for here.
        measured = order(sizes, measure)
        return [measured[step] for step in range(len(measured))]

    count = -(-max(over_all_steps(lambda some: len(_pack(some, length)))) // multiple) * multiple
    tightly = functools.partial(_pack_tightly, count=count, length=length, unit=unit, head=len(head))
    lengths = row_lengths(over_all_steps(lambda some: tightly(some)[0]), shapes)
    part = slice(None) if rows is None else rows(count)
    assemble = functools.partial(_collate, pack=tightly, count=count, lengths=lengths, head=head, part=part)
    return order(examples, assemble)


def packed_steps(examples: Sequence[Example], *, length: int, share: bool = True, **order) -> grain.MapDataset:
    """The steps of `make_packed_batches` as rows of their own lengths, for whoever puts batches together otherwise.

    Nothing is packed beforehand: a million examples cost nothing until their step comes.

    Args:
        examples, share: as there.
        length: the most tokens of a packed row; 0 packs nothing, and each example is a row.
        **order: batch_size, seed, epochs and steps, as there.

    Returns:
        A Grain dataset whose element i is the list of step i's rows, dicts of arrays [n] without padding.
    """
    head = _shared_head(examples, share and length > 0)
    return in_steps(examples, functools.partial(_rows_of_step, head=head, length=length), **order)


def _rows_of_step(examples: Sequence[Example], *, head: np.ndarray, length: int) -> list[Batch]:
    behind, rows = [_behind(head, example) for example in examples], []
    apart = [behind] if length else [[one] for one in behind]
    for packed in itertools.chain(*(_pack(some, (length or len(some[0]["tokens"])) - len(head)) for some in apart)):
        shape = 1, np.count_nonzero(packed["tokens_segment_ids"])
        rows.append({name: values[0] for name, values in _with_head([packed], head, shape).items()})
    return rows


def _shared_head(examples: Sequence[Example], share: bool) -> np.ndarray:
    """The tokens that all examples begin with; none where nothing is shared."""
    # None of them, nor the next, is an answer's in any example: what they predict is learnt by none.
    prompts = [example["tokens"][: max(int(np.argmax(example["answer"])) - 1, 0)] for example in examples]
    return prompts[0][: shared_prefix(prompts) if share else 0]


def _behind(head: np.ndarray, example: Example) -> dict[str, np.ndarray]:
    """What an example learns behind the tokens that all begin with."""
    return {name: values[len(head) :] for name, values in with_targets(example).items()}


def row_lengths(needed: Iterable[int], shapes: int) -> tuple[int, ...]:
    """So many lengths that leave the fewest tokens empty, ascending, where each step takes the next that it needs."""
    times = Counter(needed)
    *others, longest = sorted(times)
    choices = [(*some, longest) for some in itertools.combinations(others, min(shapes - 1, len(others)))]

    def tokens(lengths: tuple[int, ...]) -> int:
        return sum(count * next(length for length in lengths if length >= n) for n, count in times.items())

    return min(choices, key=tokens)


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


def _pack_tightly(examples: Sequence[dict], count: int, length: int, unit: int, head: int) -> tuple[int, list[dict]]:
    """The least length of a row at which `count` rows do, and the rows; with `head` more, `unit` divides it.

    It is `length` where no less will do.
    """
    tokens = [len(example["tokens"]) for example in examples]
    least = max(*tokens, -(-sum(tokens) // count)) + head
    for whole in range(-(-least // unit) * unit, length + head, unit):
        if len(packed := _pack(examples, whole - head)) <= count:
            return whole - head, packed
    return length, _pack(examples, length)


def _collate(
    examples: Sequence[dict], *, pack: Callable, count: int, lengths: tuple[int, ...], head: np.ndarray, part
) -> Batch:
    """Packs a step's examples, pads to the next length and with empty rows, and returns the rows asked for of it.

    Each row begins with `head`.
    """
    needed, packed = pack(examples)
    batch = _with_head(packed, head, (count, next(length for length in lengths if length >= needed)))
    return {name: values[part] for name, values in batch.items()}


def _with_head(packed: Sequence[dict], head: np.ndarray, shape: tuple[int, int]) -> Batch:
    """The arrays of packed rows, cut or padded to a shape, each behind `head`."""
    batch, beginning = {}, {"tokens": head, "positions": np.arange(len(head)), "segment_ids": SHARED}
    for name, key in _ARRAYS.items():
        values = np.stack([row[key][: shape[1]] for row in packed])
        widen = [(0, whole - given) for whole, given in zip(shape, values.shape, strict=True)]
        begin = np.broadcast_to(np.asarray(beginning.get(name, 0), values.dtype), (shape[0], len(head)))
        batch[name] = np.concatenate([begin, np.pad(values, widen)], axis=1)
    batch["positions"] += len(head) * (batch["segment_ids"] > 0)
    return batch
