"""Rows as tokens with an answer mask, and Grain batches of a few static shapes, padded or packed.

Packing changes the layout of a step, never its rows: step i has the rows of the padded run's step i. So both runs
follow one trajectory up to the order of floating-point sums, dropout masks aside. What all of a run's rows begin with
(a template's header) stands once in each packed row, where every row sees it.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.data.templates import render, tokenize

# {"tokens": int32[n], "answer": bool[n]}, and where it is not 1 "weight" (f32 of each answer token)
Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]
# The segment of what all segments of a packed row begin with; their positions go on behind it.
SHARED = -1
RowSelector = Callable[[int], np.ndarray]  # of a batch of that many rows, which: [n] int, see `core.mesh.local_rows`

# A batch's arrays, by Grain's names.
_ARRAYS = {name: name for name in ("tokens", "targets", "weights")}
_ARRAYS |= {name: f"tokens_{name}" for name in ("positions", "segment_ids")}
_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # a batch is packed in the thread that asks for it
_NO_HEAD = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Dropped:
    """What became of the rows given to `encode_rows`."""

    rows: int  # how many were given
    truncated: int  # kept, but their end was cut
    total: int  # left out, because the prompt fills the whole length
    first: str = ""  # the first of both, and its length


def encode(row: Row, tokenizer: PreTrainedTokenizerFast, template: str) -> Example:
    """Tokenizes a row, which ends with an assistant turn, as one string and marks the answer.

    A token that covers any character of an answer or of the token ending it is an answer token, also when
    it reaches back into the prompt.
    """
    text, spans = render(row, template, tokenizer)
    ids, offsets = tokenize(text, template, tokenizer)
    begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    answer = np.zeros(len(ids), bool)
    for first, last in spans:
        answer |= (end > first) & (begin < last)
    return {"tokens": np.asarray(ids, np.int32), "answer": answer}


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, template: str, max_length: int
) -> tuple[list[Example], Dropped]:
    """Encodes rows to train on, in their order, and counts those that are cut, at their end as in the reference.

    A `UserError` when no example is left, and as `render`.
    """
    if not rows:
        raise UserError("there are no rows to train on")
    examples, long = [], []
    for index, row in enumerate(rows):
        example = encode(row, tokenizer, template)
        if (length := len(example["tokens"])) > max_length:
            long.append(f"{row.origin or f'row {index + 1}'}, has {length:,} tokens")
            # A copy, for a view would keep the whole.
            example = {name: values[:max_length].copy() for name, values in example.items()}
        if example["answer"].any():
            examples.append(example)
    if not examples:
        first = f" (the first, {long[0]})" if long else ""
        raise UserError(
            f"no row is left to train on: {len(rows)} of {len(rows)} do not fit {max_length} tokens{first}; "
            "raise the limit or shorten the prompts"
        )
    total = len(rows) - len(examples)
    return examples, Dropped(len(rows), len(long) - total, total, *long[:1])


def normalize_per_example(examples: Sequence[Example]) -> list[Example]:
    """The same rows, each with a weight by which all count the same in a loss, long answers or short."""
    return [e | {"weight": np.float32(1 / max(np.count_nonzero(e["answer"][1:]), 1))} for e in examples]


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def in_steps(
    elements: Sequence,
    assemble: Callable[[Sequence], Any],
    *,
    batch_size: int,
    seed: int,
    epochs: int = 1,
    steps: int | None = None,
) -> grain.MapDataset:
    """What `assemble` makes of each step's elements, with random access; which these are depends on their number alone.

    Every epoch is shuffled anew (0 <= seed < 2**32), and its last step has fewer. `steps` is in place of `epochs`.
    """
    count = len(elements)
    # Not Grain's shuffle, which walks through 65,536 numbers an epoch, however few the elements are: 80 ms, here 20 us.
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(count))
    drawn = grain.MapDataset.range(count).map_with_index(lambda i, _: elements[order(i // count)[i % count]])
    # Batched before repeating: a batch never mixes two epochs.
    batches = drawn.batch(batch_size, batch_fn=assemble)
    return batches.repeat(epochs) if steps is None else batches.repeat().slice(slice(0, steps))


def iterate(batches: grain.MapDataset) -> grain.DatasetIterator:
    """An iterator whose place can be saved and restored (`get_state`, `set_state`)."""
    # One thread, two batches ahead: the rows are in memory, and more would only contend for the interpreter's lock.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def make_batches(
    examples: Sequence[Example], *, batch_size: int, buckets: Sequence[int], rows: RowSelector | None = None, **order
) -> grain.MapDataset:
    """Shuffled batches of padded rows; element i is the batch of step i, always the same one.

    A batch has the length of the smallest bucket that holds its longest row, whichever of its `rows` are asked for
    (None: all), so that processes agree on its shape. An epoch's last batch is filled up with empty rows. `order` is
    seed, epochs and steps, see `in_steps`.

    Returns:
        Dicts of numpy arrays [batch_size, T], or fewer rows: tokens and targets (the next token) int32, weights f32
        (the row's where the target is an answer token, 0 elsewhere), positions int32, segment_ids int32 (1 for a row,
        0 for padding).
    """
    part = slice(None) if rows is None else rows(batch_size)

    def assemble(some: Sequence[Example]) -> Batch:
        laid = [_with_targets(example) for example in some]
        lengths = [len(example["tokens"]) for example in some]
        for row, n in zip(laid, lengths, strict=True):
            row |= {"tokens_positions": np.arange(n, dtype=np.int32), "tokens_segment_ids": np.ones(n, np.int32)}
        return _lay(laid, (batch_size, min(bucket for bucket in buckets if bucket >= max(lengths))), part=part)

    return in_steps(examples, assemble, batch_size=batch_size, **order)


def make_packed_batches(
    examples: Sequence[Example],
    *,
    length: int,
    multiple: int = 1,
    unit: int = 128,
    share: bool = True,
    shapes: int = 3,
    rows: RowSelector | None = None,
    **order,
) -> grain.MapDataset:
    """The batches of `make_batches`, packed; element i is the batch of step i, always the same one.

    All steps are packed once beforehand, by their lengths alone: the largest says how many packed rows every batch
    has, and a few lengths of them serve the whole run (see `row_lengths`), so that each process knows the shapes.

    Args:
        length: the most tokens of a packed row, at least an example's; the longer, the less is left empty.
        multiple: what a batch's row count is a multiple of, so that a mesh and micro-batches can split it.
        unit: what a packed row's length is a multiple of, unless it is `length`.
        share: whether what all examples begin with is run once for all of a row; "splash" cannot.
        shapes: how many lengths serve the run.
        rows: which (packed) rows of every batch to give; None gives all.
        **order: batch_size, seed, epochs and steps, see `in_steps`.

    Returns:
        As `make_batches`, but with segment_ids 1, 2, ... for the examples of a row, and positions that begin at 0 in
        each, or go on behind the shared beginning, whose segment is `SHARED`; 0 is padding, at the end of a row.
    """
    head = _shared_head(examples, share)
    examples = [_with_targets(example, head) for example in examples]
    length, sizes = length - len(head), [{"tokens": example["tokens"]} for example in examples]

    def over_all_steps(measure: Callable[[Sequence[dict]], int]) -> list[int]:
        # By index: iterating over a Grain dataset would start its threads, which have nothing to wait for here.
        measured = in_steps(sizes, measure, **order)
        return [measured[step] for step in range(len(measured))]

    def tightly(some: Sequence[dict]) -> tuple[int, list[dict]]:
        """The least length at which `count` rows do, with the head a multiple of `unit` or else all; and the rows."""
        tokens = [len(example["tokens"]) for example in some]
        least = max(*tokens, -(-sum(tokens) // count)) + len(head)
        for whole in range(-(-least // unit) * unit, length + len(head), unit):
            if len(packed := _pack(some, whole - len(head))) <= count:
                return whole - len(head), packed
        return length, _pack(some, length)

    count = -(-max(over_all_steps(lambda some: len(_pack(some, length)))) // multiple) * multiple
    lengths = row_lengths(over_all_steps(lambda some: tightly(some)[0]), shapes)
    part = slice(None) if rows is None else rows(count)

    def assemble(some: Sequence[dict]) -> Batch:
        needed, packed = tightly(some)
        return _lay(packed, (count, next(n for n in lengths if n >= needed)), head, part)

    return in_steps(examples, assemble, **order)


def packed_steps(examples: Sequence[Example], *, length: int, share: bool = True, **order) -> grain.MapDataset:
    """The steps of `make_packed_batches`, each the list of its rows, dicts of arrays [n] without padding.

    Nothing is packed beforehand: a million examples cost nothing until their step comes. `length` 0 packs nothing: each
    example is a row. The other settings are as there.
    """
    head = _shared_head(examples, share and length > 0)

    def assemble(some: Sequence[Example]) -> list[Batch]:
        behind = [_with_targets(example, head) for example in some]
        apart = [(behind, length - len(head))] if length else [([one], len(one["tokens"])) for one in behind]
        packed = [row for examples, room in apart for row in _pack(examples, room)]
        return [_lay([row], (1, np.count_nonzero(row["tokens_segment_ids"])), head, part=0) for row in packed]

    return in_steps(examples, assemble, **order)


def row_lengths(needed: Iterable[int], shapes: int) -> tuple[int, ...]:
    """So many lengths that leave the fewest tokens empty, ascending, where each step takes the next that it needs."""
    times = Counter(needed)
    *others, longest = sorted(times)
    choices = [(*some, longest) for some in itertools.combinations(others, min(shapes - 1, len(others)))]

    def tokens(lengths: tuple[int, ...]) -> int:
        return sum(count * next(length for length in lengths if length >= n) for n, count in times.items())

    return min(choices, key=tokens)


def _with_targets(example: Example, head: np.ndarray = _NO_HEAD) -> dict[str, np.ndarray]:
    """What a row's tokens behind `head` learn: tokens, targets (the next, 0 after the last) and weights."""
    targets, weights = np.zeros_like(example["tokens"]), np.zeros(len(example["tokens"]), np.float32)
    targets[:-1] = example["tokens"][1:]
    weights[:-1] = example["answer"][1:] * example.get("weight", np.float32(1))
    row = {"tokens": example["tokens"], "targets": targets, "weights": weights}
    return {name: values[len(head) :] for name, values in row.items()}


def _shared_head(examples: Sequence[Example], share: bool) -> np.ndarray:
    """The tokens that all examples begin with; none where nothing is shared."""
    # None of them, nor the next, is an answer's in any example: what they predict is learnt by none.
    prompts = [example["tokens"][: max(int(np.argmax(example["answer"])) - 1, 0)] for example in examples]
    return prompts[0][: shared_prefix(prompts) if share else 0]


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


def _lay(rows: Sequence[dict], shape: tuple[int, int], head: np.ndarray = _NO_HEAD, part: Any = slice(None)) -> Batch:
    """The rows cut or padded to a shape, and empty ones, each behind `head`; `part` of them.

    Masks come from lengths, so any id serves as padding and EOS may be the same id.
    """
    (count, length), begin = shape, len(head)
    batch, heads = {}, {"tokens": head, "positions": np.arange(begin), "segment_ids": SHARED}
    for name, key in _ARRAYS.items():
        laid = batch[name] = np.zeros((count, begin + length), rows[0][key].dtype)
        laid[:, :begin] = heads.get(name, 0)
        for index, row in enumerate(rows):
            values = row[key][:length]
            laid[index, begin : begin + len(values)] = values
    batch["positions"] += begin * (batch["segment_ids"] > 0)
    return {name: values[part] for name, values in batch.items()}
