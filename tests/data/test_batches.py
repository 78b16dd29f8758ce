"""Encoding and batching, padded and packed, against transformers' masks, the reference's rule and plain loops."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.data.batches import (
    SHARED,
    Dropped,
    encode,
    encode_rows,
    iterate,
    make_batches,
    make_packed_batches,
    row_lengths,
)
from br_jax.data.rows import Row
from br_jax.data.templates import render, render_prompt

CHAT = Row((("user", "One?"), ("assistant", "Un."), ("user", "Two? é日"), ("assistant", "Deux. é日")))
DTYPES = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32) | {"weights": np.float32}


def row(question="Name a color.", answer="Red.", origin="f:1"):
    return Row((("user", question), ("assistant", answer)), origin=origin)


@pytest.fixture(scope="module")
def examples(byte_tokenizer):
    rows = [row("?" * (index % 5 + 1), "!" * (7 * index % 40 + 1)) for index in range(22)]
    return encode_rows(rows, byte_tokenizer, "chat", 512)[0]


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def shapes(batch):
    return {name: (values.shape, values.dtype) for name, values in batch.items()}


@pytest.mark.parametrize("bos", [False, True])
def test_alpaca_mask_is_the_references(make_tokenizer, bos):
    """The reference masks as many tokens as the prompt alone has."""
    tokenizer = make_tokenizer(bos=bos)
    prompt = tokenizer(render_prompt(row(), "alpaca", tokenizer))["input_ids"]
    for text in ("Red.", "é日🙂", " x\n"):
        example = encode(row(answer=text), tokenizer, "alpaca")
        whole = tokenizer(render(row(answer=text), "alpaca", tokenizer)[0])["input_ids"]
        assert example["tokens"].tolist() == whole and example["tokens"].dtype == np.int32
        assert example["answer"].tolist() == [index >= len(prompt) for index in range(len(whole))]


def test_answers_reach_back_into_a_token_and_end_with_eos_also_when_it_is_the_padding(make_tokenizer):
    tokenizer = make_tokenizer(merges=[("Ċ", "R")])
    example = encode(row(), tokenizer, "alpaca")
    assert tokenizer.decode(example["tokens"][example["answer"]]) == "\nRed.<eos>"
    tokenizer = make_tokenizer(pad="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for template in ("alpaca", "chat"):
        batch = make_batches([encode(CHAT, tokenizer, template)], batch_size=2, seed=0, buckets=[512])[0]
        assert tokenizer.decode(batch["targets"][batch["weights"] > 0]) == "Un.<eos>Deux. é日<eos>"


def test_what_is_cut_or_left_out_is_counted(byte_tokenizer):
    whole = encode(row("b", "x" * 50), byte_tokenizer, "chat")
    rows = [row("a"), row("b", "x" * 50, "f:2"), row("c" * 99)]
    (first, cut), dropped = encode_rows(rows, byte_tokenizer, "chat", 60)
    assert dropped == Dropped(rows=3, truncated=1, total=1, first="f:2, has 94 tokens")
    assert len(first["tokens"]) < 60 and all(np.array_equal(cut[name], whole[name][:60]) for name in whole)
    with pytest.raises(UserError, match=r"^there are no rows to train on$"):
        encode_rows([], byte_tokenizer, "chat", 100)
    with pytest.raises(UserError, match=r"2 of 2 do not fit 60 tokens \(the first, f:1, has 1\d\d tokens\); raise"):
        encode_rows([row("c" * 99)] * 2, byte_tokenizer, "chat", 60)


def test_a_batch_is_what_a_plain_loop_makes(examples):
    by_tokens = {tuple(example["tokens"].tolist()): example["answer"].tolist() for example in examples}
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[64, 48, 96, 128])
    assert len(batches) == 6
    for batch in batches:
        lengths = batch["segment_ids"].sum(axis=1).tolist()
        length = min(bucket for bucket in (48, 64, 96, 128) if bucket >= max(lengths))
        assert shapes(batch) == {name: ((4, length), dtype) for name, dtype in DTYPES.items()}
        for index, n in enumerate(lengths):
            tokens, padding = batch["tokens"][index].tolist(), [0] * (length - n)
            answer = by_tokens[tuple(tokens[:n])] if n else []
            assert tokens[n:] == padding
            assert batch["segment_ids"][index].tolist() == [1] * n + padding
            assert batch["positions"][index].tolist() == [*range(n), *padding]
            for t in range(length):
                inside = t + 1 < n
                assert batch["targets"][index, t] == (tokens[t + 1] if inside else 0)
                assert batch["weights"][index, t] == float(inside and answer[t + 1])


def test_epochs_hold_every_row_once_and_are_shuffled_anew(examples):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=3)
    lengths = [batches[step]["segment_ids"].sum(axis=1).tolist() for step in range(18)]
    assert len(batches) == 18 and [lengths[last][2:] for last in (5, 11, 17)] == [[0, 0]] * 3
    pairs = [pair for step in range(18) for pair in zip(batches[step]["tokens"].tolist(), lengths[step], strict=True)]
    everything = [tuple(tokens[:n]) for tokens, n in pairs if n]
    epochs, given = [everything[i : i + 22] for i in (0, 22, 44)], [tuple(e["tokens"].tolist()) for e in examples]
    assert all(sorted(epoch) == sorted(given) for epoch in epochs) and len(everything) == 66
    assert all(a != b for a, b in itertools.combinations([*epochs, given], 2))


def test_random_access_is_deterministic_and_seeded_and_an_iterator_goes_on_where_it_stopped(examples):
    one, again, other = (make_batches(examples, batch_size=4, seed=seed, buckets=[128], steps=12) for seed in (3, 3, 4))
    assert len(one) == 12
    forward = [one[step] for step in range(12)]
    assert all(same(forward[step], again[step]) for step in reversed(range(12)))
    assert not any(same(forward[step], other[step]) for step in range(5))
    iterator, resumed = iterate(one), iterate(again)
    for _ in range(7):
        next(iterator)
    resumed.set_state(iterator.get_state())
    for rest in (list(iterator), list(resumed)):
        assert len(rest) == 5 and all(map(same, rest, forward[7:]))


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
        assert not any(values[row][ids == 0].any() for values in batch.values()), "something in the padding"
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
        assert shapes(packed[step]) == {name: (shape, dtype) for name, dtype in DTYPES.items()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_no_other_lengths_as_few_leave_fewer_tokens(needed, shapes):
    def total(lengths):
        return sum(min(length for length in lengths if length >= n) for n in needed)

    lengths = row_lengths(needed, shapes)
    others = [{*some, max(needed)} for some in itertools.combinations_with_replacement(needed, shapes - 1)]
    assert lengths == tuple(sorted(set(lengths))) and lengths[-1] == max(needed)
    assert total(lengths) == min(map(total, others)) and len(lengths) <= shapes


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_processes_share_a_batch_and_its_shape(kind):
    examples = make_examples([1 + 7 * index % LENGTH for index in range(22)])
    order = {"seed": 3, "epochs": 2}
    padded = functools.partial(make_batches, examples, batch_size=3, buckets=[8, 12, LENGTH], **order)
    shape = {"length": LENGTH, "unit": 3, "multiple": 6}
    packed = functools.partial(make_packed_batches, examples, batch_size=18, **shape, **order)
    make = padded if kind == "padded" else packed
    whole, parts = make(), [make(rows=lambda n, i=i: np.arange(n // 3) + i * n // 3) for i in range(3)]
    for step in range(len(whole)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}
        assert same(joined, whole[step])
    assert len({whole[step]["tokens"].shape for step in range(len(whole))}) > 1
