"""Packed batches against the examples themselves, the padded batches and plain loops."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from br_jax.data.batches import iterate, make_batches
from br_jax.data.packing import make_packed_batches, row_counts

LENGTH = 16


def make_examples(lengths):
    """Examples of these lengths; no token occurs twice, and each answer is the second half."""
    starts = np.cumsum([1, *lengths[:-1]])
    return [
        {"tokens": np.arange(start, start + n, dtype=np.int32), "answer": np.arange(n) >= n // 2}
        for start, n in zip(starts, lengths, strict=True)
    ]


def read_back(batch):
    """{first token: its segment's arrays}, each cut out of the batch where its segment id stands."""
    found = {}
    for row, ids in enumerate(batch["segment_ids"]):
        present = sorted(set(ids.tolist()) - {0})
        assert present == [*range(1, len(present) + 1)]
        assert ids.tolist() == sorted(ids.tolist(), key=lambda i: i or len(ids) + 1), "segments out of order, or gaps"
        for segment in present:
            cut = {name: values[row][ids == segment].tolist() for name, values in batch.items()}
            assert cut["tokens"][0] not in found
            found[cut["tokens"][0]] = cut
        for name, values in batch.items():
            assert not values[row][ids == 0].any(), f"{name} in the padding"
    return found


def rows_by_a_plain_loop(lengths):
    """How many rows first-fit decreasing takes."""
    room = []
    for n in sorted(lengths, reverse=True):
        row = next((row for row, free in enumerate(room) if n <= free), None)
        if row is None:
            room.append(LENGTH)
            row = -1
        room[row] -= n
    return len(room)


def first_tokens(padded):
    return {int(row[0]) for row, ids in zip(padded["tokens"], padded["segment_ids"], strict=True) if ids.any()}


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=20),
    batch_size=st.integers(1, 24),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 5),
)
@example(lengths=[5], batch_size=1, multiple=1, seed=0)  # one row
@example(lengths=[LENGTH] * 6, batch_size=3, multiple=2, seed=0)  # nothing can share
@example(lengths=[1] * 20, batch_size=20, multiple=1, seed=0)  # one token each: nothing to learn inside a row
@example(lengths=[3, 4], batch_size=24, multiple=1, seed=0)  # the batch is larger than the data
@example(lengths=[9, 8, 7, 8], batch_size=4, multiple=1, seed=0)  # two rows, filled to the last token
def test_every_example_of_the_padded_step_is_there_once_and_whole(lengths, batch_size, multiple, seed):
    examples = make_examples(lengths)
    by_first = {int(one["tokens"][0]): one for one in examples}
    order = {"batch_size": batch_size, "seed": seed, "epochs": 2}
    padded = make_batches(examples, buckets=[LENGTH], **order)
    packed = make_packed_batches(examples, length=LENGTH, multiple=multiple, **order)
    assert len(packed) == len(padded)
    shapes = set()
    for step in range(len(packed)):
        batch = packed[step]
        shapes.add(batch["tokens"].shape)
        found = read_back(batch)
        assert found.keys() == first_tokens(padded[step])
        for first, cut in found.items():
            tokens, answer = by_first[first]["tokens"].tolist(), by_first[first]["answer"].tolist()
            assert cut["tokens"] == tokens
            assert cut["targets"] == [*tokens[1:], 0]
            assert cut["weights"] == [*map(float, answer[1:]), 0.0]
            assert cut["positions"] == [*range(len(tokens))]
        filled = int(batch["segment_ids"].any(axis=1).sum())
        assert filled == rows_by_a_plain_loop([len(cut["tokens"]) for cut in found.values()])
        assert {name: (values.shape[1], values.dtype) for name, values in batch.items()} == {
            name: (LENGTH, np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "weights", "positions", "segment_ids")
        }
    assert len(shapes) <= 2 and all(rows % multiple == 0 for rows, _ in shapes)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_no_other_two_row_counts_leave_fewer_rows(needed):
    def total(counts):
        return sum(min(count for count in counts if count >= n) for n in needed)

    counts = row_counts(needed)
    pairs = [{low, max(needed)} for low in needed]
    assert counts == tuple(sorted(set(counts))) and counts[-1] == max(needed)
    assert total(counts) == min(map(total, pairs))
    assert len(counts) == min(2, len(set(needed)))


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


LENGTHS = [1 + 7 * index % LENGTH for index in range(22)]


def test_processes_share_a_batch_and_its_shape():
    order = {"batch_size": 20, "seed": 3, "epochs": 2, "length": LENGTH}
    whole = make_packed_batches(make_examples(LENGTHS), **order, multiple=6)

    def third(i):
        return lambda n: np.arange(n // 3) + i * n // 3

    parts = [make_packed_batches(make_examples(LENGTHS), **order, multiple=6, rows=third(i)) for i in range(3)]
    for step in range(len(whole)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        assert same(joined, whole[step])
    assert {whole[step]["tokens"].shape[0] for step in range(len(whole))} == {6, 12}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_iterator_goes_on_where_it_stopped(prefetch):
    batches = make_packed_batches(make_examples(LENGTHS), batch_size=4, seed=3, length=LENGTH, steps=15)
    iterator = iterate(batches, prefetch)
    for _ in range(8):
        next(iterator)
    resumed = iterate(batches, prefetch)
    resumed.set_state(iterator.get_state())
    rest = list(iterator)
    assert len(rest) == 7
    assert all(same(a, b) for a, b in zip(rest, resumed, strict=True))
    assert all(same(a, batches[step]) for step, a in enumerate(rest, start=8))
    assert not any(same(a, b) for a, b in itertools.combinations(rest, 2))


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="max length"):
        make_packed_batches(make_examples([LENGTH + 1]), batch_size=1, seed=0, length=LENGTH)
