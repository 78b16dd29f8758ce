"""Packed batches against the examples themselves, the padded batches and plain loops."""

import functools
import itertools

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from br_jax.data.batches import SHARED, make_batches
from br_jax.data.packing import make_packed_batches, row_lengths

LENGTH = 16


def make_examples(lengths, head=0):
    """Examples of so many tokens that occur nowhere else, the second half an answer, behind `head` that all have."""
    starts = 101 + np.cumsum([0, *lengths[:-1]])
    return [
        {
            "tokens": np.asarray([*range(1, head + 1), *range(start, start + n)], np.int32),
            "answer": np.arange(head + n) >= head + n // 2,
        }
        for start, n in zip(starts, lengths, strict=True)
    ]


def shared_by_a_plain_loop(examples):
    """How many tokens all of them begin with, none of which, nor the next, is an answer's."""
    shared = 0
    while all(len(e["tokens"]) > shared + 1 and not e["answer"][: shared + 2].any() for e in examples):
        if len({int(e["tokens"][shared]) for e in examples}) > 1:
            break
        shared += 1
    return shared


def read_back(batch, shared):
    """{last token: its arrays}, each put together of a row's shared beginning and where its segment id stands."""
    found = {}
    for row, ids in enumerate(batch["segment_ids"]):
        present = sorted(set(ids.tolist()) - {0, SHARED})
        assert present == [*range(1, len(present) + 1)] and (ids == SHARED).sum() == shared
        assert ids.tolist() == sorted(ids.tolist(), key=lambda i: i or len(ids) + 1), "segments out of order, or gaps"
        for segment in present:
            parts = {name: (values[row][ids == SHARED], values[row][ids == segment]) for name, values in batch.items()}
            assert not parts["weights"][0].any()
            cut = {name: np.concatenate(part).tolist() for name, part in parts.items()}
            assert cut["tokens"][-1] not in found
            found[cut["tokens"][-1]] = cut
        for name, values in batch.items():
            assert not values[row][ids == 0].any(), f"{name} in the padding"
    return found


def rows_by_a_plain_loop(lengths, capacity):
    """How many rows first-fit decreasing takes."""
    room = []
    for n in sorted(lengths, reverse=True):
        row = next((row for row, free in enumerate(room) if n <= free), None)
        if row is None:
            room.append(capacity)
            row = -1
        room[row] -= n
    return len(room)


def length_by_a_plain_loop(lengths, count, unit, shared):
    """The first multiple of `unit` at which first-fit decreasing takes `count` rows of them, or else LENGTH."""

    def fits(n):
        return max(lengths) <= n - shared and rows_by_a_plain_loop(lengths, n - shared) <= count

    return next(filter(fits, range(unit, LENGTH, unit)), LENGTH)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, LENGTH - 4), min_size=1, max_size=20),
    head=st.integers(0, 4),
    batch_size=st.integers(1, 24),
    multiple=st.integers(1, 4),
    unit=st.sampled_from([3, 4, 128]),
    seed=st.integers(0, 5),
)
@example(lengths=[5], batch_size=1, multiple=1, unit=4, seed=0, head=0)  # one row
@example(lengths=[LENGTH] * 6, batch_size=3, multiple=2, unit=4, seed=0, head=0)  # nothing can share
@example(lengths=[12, 6, 6, 6, 3], batch_size=4, multiple=1, unit=4, seed=0, head=4)  # a beginning in every row
@example(lengths=[1, 6, 6], batch_size=3, multiple=1, unit=4, seed=0, head=4)  # whose last token predicts an answer
@example(lengths=[1] * 20, batch_size=20, multiple=1, unit=4, seed=0, head=0)  # nothing to learn inside a row
@example(lengths=[3, 4], batch_size=24, multiple=1, unit=4, seed=0, head=0)  # the batch is larger than the data
@example(lengths=[9, 8, 7, 8], batch_size=4, multiple=1, unit=4, seed=0, head=0)  # two rows, filled to the last token
@example(lengths=[9, 2, 7, 2, 5, 1], batch_size=1, multiple=1, unit=3, seed=0, head=0)  # a length for each step
def test_every_example_of_the_padded_step_is_there_once_and_whole(lengths, batch_size, multiple, unit, seed, head):
    examples = make_examples(lengths, head)
    shared = shared_by_a_plain_loop(examples)
    by_last = {int(one["tokens"][-1]): one for one in examples}
    order = {"batch_size": batch_size, "seed": seed, "epochs": 2}
    padded = make_batches(examples, buckets=[LENGTH], **order)
    packed = make_packed_batches(examples, length=LENGTH, multiple=multiple, unit=unit, **order)
    assert len(packed) == len(padded)
    found_by_step = [read_back(packed[step], shared) for step in range(len(packed))]
    lengths_by_step = [[len(cut["tokens"]) - shared for cut in found.values()] for found in found_by_step]
    most = max(rows_by_a_plain_loop(some, LENGTH - shared) for some in lengths_by_step)
    count = -(-most // multiple) * multiple
    needed = [length_by_a_plain_loop(some, count, unit, shared) for some in lengths_by_step]
    for step, found in enumerate(found_by_step):
        assert sorted(found) == sorted(tokens.max() for tokens in padded[step]["tokens"] if tokens[0])
        for last, cut in found.items():
            tokens, answer = by_last[last]["tokens"].tolist(), by_last[last]["answer"].tolist()
            assert cut["tokens"] == tokens
            assert cut["targets"][shared:] == [*tokens[shared + 1 :], 0]
            assert cut["weights"] == [*map(float, answer[1:]), 0.0]
            assert cut["positions"] == [*range(len(tokens))]
        shape = (count, next(n for n in row_lengths(needed, 3) if n >= needed[step]))
        assert {name: (values.shape, values.dtype) for name, values in packed[step].items()} == {
            name: (shape, np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "weights", "positions", "segment_ids")
        }


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_no_other_lengths_as_few_leave_fewer_tokens(needed, shapes):
    def total(lengths):
        return sum(min(length for length in lengths if length >= n) for n in needed)

    lengths = row_lengths(needed, shapes)
    others = [{*some, max(needed)} for some in itertools.combinations_with_replacement(needed, shapes - 1)]
    assert lengths == tuple(sorted(set(lengths))) and lengths[-1] == max(needed)
    assert total(lengths) == min(map(total, others))
    assert len(lengths) <= shapes


def test_processes_share_a_batch_and_its_shape():
    examples = make_examples([1 + 7 * index % LENGTH for index in range(22)])
    settings = {"batch_size": 20, "seed": 3, "epochs": 2, "length": LENGTH, "unit": 3, "multiple": 6}
    make = functools.partial(make_packed_batches, examples, **settings)
    whole, parts = make(), [make(rows=lambda n, i=i: np.arange(n // 3) + i * n // 3) for i in range(3)]
    for step in range(len(whole)):
        for name, values in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), values)
    shapes = {whole[step]["tokens"].shape for step in range(len(whole))}
    assert {rows for rows, _ in shapes} == {12} and len(shapes) > 1
