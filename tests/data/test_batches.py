"""Encoding and batching, against transformers' masks, the reference's rule and plain loops."""

import itertools

import numpy as np
import pytest

from br_jax.core.errors import UserError
from br_jax.data.batches import Dropped, encode, encode_rows, iterate, make_batches
from br_jax.data.rows import Row
from br_jax.data.templates import render, render_prompt

CHAT = Row((("user", "One?"), ("assistant", "Un."), ("user", "Two? é日"), ("assistant", "Deux. é日")))


def row(question="Name a color.", answer="Red.", origin="f:1"):
    return Row((("user", question), ("assistant", answer)), origin=origin)


@pytest.fixture(scope="module")
def examples(byte_tokenizer):
    rows = [row("?" * (index % 5 + 1), "!" * (7 * index % 40 + 1)) for index in range(22)]
    return encode_rows(rows, byte_tokenizer, "chat", 512)[0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("text", ["Red.", "é日🙂", " x\n"])
def test_alpaca_mask_is_the_references(make_tokenizer, text, bos):
    """The reference masks as many tokens as the prompt alone has."""
    tokenizer = make_tokenizer(bos=bos)
    example = encode(row(answer=text), tokenizer, "alpaca")
    prompt = tokenizer(render_prompt(row(), "alpaca", tokenizer))["input_ids"]
    whole = tokenizer(render(row(answer=text), "alpaca", tokenizer)[0])["input_ids"]
    assert example["tokens"].tolist() == whole
    assert example["answer"].tolist() == [index >= len(prompt) for index in range(len(whole))]
    assert example["tokens"].dtype == np.int32 and example["answer"].dtype == bool


def test_a_token_across_the_border_belongs_to_the_answer(make_tokenizer):
    tokenizer = make_tokenizer(merges=[("Ċ", "R")])
    example = encode(row(), tokenizer, "alpaca")
    assert tokenizer.decode(example["tokens"][example["answer"]]) == "\nRed.<eos>"


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_eos_is_learnt_also_when_it_is_the_padding(make_tokenizer, template):
    tokenizer = make_tokenizer(pad="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode(CHAT, tokenizer, template)
    batch = make_batches([example], batch_size=2, seed=0, buckets=[512])[0]
    assert tokenizer.decode(batch["targets"][batch["weights"] > 0]) == "Un.<eos>Deux. é日<eos>"


def test_truncation_keeps_the_beginning(byte_tokenizer):
    whole = encode(row(), byte_tokenizer, "alpaca")
    length = len(whole["tokens"])
    ((cut,), _) = encode_rows([row()], byte_tokenizer, "alpaca", length - 2)
    assert cut["tokens"].tolist() == whole["tokens"][:-2].tolist()
    assert cut["answer"].sum() == len("Red.") - 1
    with pytest.raises(UserError, match="1 of 1 do not fit"):
        encode_rows([row()], byte_tokenizer, "alpaca", length - len("Red.") - 1)


def test_counts(byte_tokenizer):
    rows = [row("a"), row("b", "x" * 50, "f:2"), row("c" * 99)]
    examples, dropped = encode_rows(rows, byte_tokenizer, "chat", 60)
    assert (len(examples), dropped) == (2, Dropped(rows=3, truncated=1, total=1, first="f:2, has 94 tokens"))
    assert len(examples[0]["tokens"]) < 60 == len(examples[1]["tokens"])
    with pytest.raises(UserError, match=r"^there are no rows to train on$"):
        encode_rows([], byte_tokenizer, "chat", 100)
    with pytest.raises(UserError, match=r"2 of 2 do not fit 60 tokens \(the first, f:1, has 1\d\d tokens\); raise"):
        encode_rows([row("c" * 99)] * 2, byte_tokenizer, "chat", 60)


def lengths(batch):
    return batch["segment_ids"].sum(axis=1).tolist()


def test_a_batch_is_what_a_plain_loop_makes(examples):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[64, 48, 96, 128])
    by_tokens = {tuple(example["tokens"].tolist()): example["answer"].tolist() for example in examples}
    assert len(batches) == 6
    for batch in batches:
        longest = max(lengths(batch))
        length = min(bucket for bucket in (48, 64, 96, 128) if bucket >= longest)
        assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
            name: ((4, length), np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "weights", "positions", "segment_ids")
        }
        for index, n in enumerate(lengths(batch)):
            tokens = batch["tokens"][index].tolist()
            answer = by_tokens[tuple(tokens[:n])] if n else []
            padding = [0] * (length - n)
            assert tokens[n:] == padding
            assert batch["segment_ids"][index].tolist() == [1] * n + padding
            assert batch["positions"][index].tolist() == [*range(n), *padding]
            for t in range(length):
                inside = t + 1 < n
                assert batch["targets"][index, t] == (tokens[t + 1] if inside else 0)
                assert batch["weights"][index, t] == float(inside and answer[t + 1])


def test_epochs_hold_every_row_once_and_are_shuffled_anew(examples):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=3)
    assert len(batches) == 18
    rows = [pair for b in batches for pair in zip(b["tokens"].tolist(), lengths(b), strict=True)]
    everything = [tuple(tokens[:n]) for tokens, n in rows if n]
    epochs = [everything[first : first + 22] for first in (0, 22, 44)]
    given = [tuple(example["tokens"].tolist()) for example in examples]
    assert all(sorted(epoch) == sorted(given) for epoch in epochs) and len(everything) == 66
    assert all(a != b for a, b in itertools.combinations([*epochs, given], 2))
    assert [lengths(batches[last])[2:] for last in (5, 11, 17)] == [[0, 0]] * 3


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_random_access_is_deterministic_and_seeded(examples):
    one, again, other = (make_batches(examples, batch_size=4, seed=seed, buckets=[128], steps=15) for seed in (3, 3, 4))
    assert len(one) == 15
    forward = [one[step] for step in range(15)]
    assert all(same(forward[step], again[step]) for step in reversed(range(15)))
    assert not any(same(forward[step], other[step]) for step in range(5))


def test_processes_share_a_batch_and_its_shape(examples):
    settings = {"batch_size": 4, "seed": 3, "buckets": [48, 64, 96], "epochs": 1}
    whole = make_batches(examples, **settings)
    parts = [make_batches(examples, **settings, rows=lambda n, i=i: np.arange(n // 2) + i * n // 2) for i in (0, 1)]
    for step in range(len(whole)):
        assert same({name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]}, whole[step])


def test_an_iterator_goes_on_where_it_stopped(examples):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=2)
    iterator = iterate(batches)
    for _ in range(7):
        next(iterator)
    resumed = iterate(batches)
    resumed.set_state(iterator.get_state())
    for rest in (list(iterator), list(resumed)):
        assert len(rest) == 5 and all(same(one, batches[step]) for step, one in enumerate(rest, start=7))
