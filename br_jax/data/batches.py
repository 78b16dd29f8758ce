"""Rows as tokens with an answer mask, and Grain batches of a few static lengths."""

import functools
import itertools
from collections.abc import Callable, Sequence
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
RowSelector = Callable[
    [int], np.ndarray
]  # of a batch of that many rows, which ones: [n] int, see `sharding.local_rows`


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
    """Encodes rows to train on, in their order (see `encode`), and counts those that are cut or left out.

    The end of a row of more than `max_length` tokens is cut, as the reference does.

    Raises:
        UserError: when no example is left, and as `render`.
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


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def make_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    buckets: Sequence[int],
    epochs: int = 1,
    steps: int | None = None,
    rows: RowSelector | None = None,
) -> grain.MapDataset:
    """Shuffled batches with random access: element i is the batch of step i, always the same one.

    Every epoch is shuffled anew and ends with a batch that may be filled up with empty rows (weights and
    segment_ids 0). A batch has the length of the smallest bucket that holds its longest row, whichever of its
    rows are asked for, so that processes agree on its shape.

    Args:
        examples: of `encode_rows`.
        batch_size: rows of a batch, over all processes.
        seed: of the shuffle, 0 <= seed < 2**32.
        buckets: the static lengths, one of which holds the longest row.
        epochs: passes over the examples.
        steps: the number of batches instead.
        rows: which rows of every batch to give; None gives all.

    Returns:
        A Grain dataset whose `len()` is the number of steps and whose elements are dicts of numpy arrays
        [batch_size, T], or fewer rows: tokens and targets (the next token) int32, weights f32 (the row's where the
        target is an answer token, 0 elsewhere), positions int32, segment_ids int32 (1 for a row, 0 for padding).
    """
    part = slice(None) if rows is None else rows(batch_size)
    assemble = functools.partial(_collate, batch_size=batch_size, buckets=buckets, part=part)
    return in_steps(examples, assemble, batch_size=batch_size, seed=seed, epochs=epochs, steps=steps)


def in_steps(
    elements: Sequence,
    assemble: Callable[[Sequence], Any],
    *,
    batch_size: int,
    seed: int,
    epochs: int = 1,
    steps: int | None = None,
) -> grain.MapDataset:
    """What `assemble` makes of each step's elements, fewer at the end of an epoch.

    Which elements these are depends on their number and no more; settings as in `make_batches`.
    """
    count = len(elements)
    # Not Grain's shuffle, which walks through 65,536 numbers an epoch, however few the elements are: 80 ms, here 20 us.
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(count))
    drawn = grain.MapDataset.range(count).map_with_index(lambda i, _: elements[order(i // count)[i % count]])
    # Batched before repeating: a batch never mixes two epochs.
    batches = drawn.batch(batch_size, batch_fn=assemble)
    return batches.repeat(epochs) if steps is None else batches.repeat().slice(slice(0, steps))


def with_targets(example: Example) -> dict[str, np.ndarray]:
    """What a row's n tokens learn.

    Returns:
        {"tokens": int32[n], "targets": int32[n] (the next token, 0 after the last), "weights": f32[n] (the row's weight
        where the target is an answer token)}.
    """
    targets, weights = np.zeros_like(example["tokens"]), np.zeros(len(example["tokens"]), np.float32)
    targets[:-1] = example["tokens"][1:]
    weights[:-1] = example["answer"][1:] * example.get("weight", np.float32(1))
    return {"tokens": example["tokens"], "targets": targets, "weights": weights}


def normalize_per_example(examples: Sequence[Example]) -> list[Example]:
    """The same rows, each with a weight by which all count the same in a loss, long answers or short."""
    return [e | {"weight": np.float32(1 / max(np.count_nonzero(e["answer"][1:]), 1))} for e in examples]


def iterate(batches: grain.MapDataset) -> grain.DatasetIterator:
    """An iterator whose place can be saved and restored (`get_state`, `set_state`)."""
    # One thread, two batches ahead: the rows are in memory, and more would only contend for the interpreter's lock.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _collate(examples: Sequence[Example], *, batch_size: int, buckets: Sequence[int], part) -> Batch:
    """Pads rows to one bucket and a full batch, and returns the rows of it that were asked for.

    Masks come from lengths, so any id serves as padding and EOS may be the same id.
    """
    longest = max(len(example["tokens"]) for example in examples)
    shape = (batch_size, min(bucket for bucket in buckets if bucket >= longest))
    batch = {name: np.zeros(shape, np.int32) for name in ("positions", "segment_ids")}
    batch |= {name: np.zeros(shape, values.dtype) for name, values in with_targets(examples[0]).items()}
    for index, example in enumerate(examples):
        n = len(example["tokens"])
        for name, values in with_targets(example).items():
            batch[name][index, :n] = values
        batch["positions"][index, :n] = np.arange(n)
        batch["segment_ids"][index, :n] = 1
    return {name: values[part] for name, values in batch.items()}
