"""Encoding and batching, against transformers' masks, the reference's rule and plain loops."""

import itertools

import numpy as np
import pytest

from br_jax.data.batches import Dropped, encode, encode_rows, iterate, make_batches
from br_jax.data.rows import Row
from br_jax.data.templates import render, render_prompt
from br_jax.errors import UserError

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
    example = encode(row(answer=text), tokenizer, "alpaca", 512)
    prompt = tokenizer(render_prompt(row(), "alpaca", tokenizer))["input_ids"]
    whole = tokenizer(render(row(answer=text), "alpaca", tokenizer)[0])["input_ids"]
    assert example["tokens"].tolist() == whole
    assert example["answer"].tolist() == [index >= len(prompt) for index in range(len(whole))]
    assert example["tokens"].dtype == np.int32 and example["answer"].dtype == bool


def test_chat_mask_is_transformers(byte_tokenizer):
    messages = [{"role": role, "content": text} for role, text in CHAT.turns]
    oracle = byte_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    example = encode(CHAT, byte_tokenizer, "chat", 512)
    assert example["tokens"].tolist() == oracle["input_ids"]
    assert example["answer"].astype(int).tolist() == oracle["assistant_masks"]


def test_a_token_across_the_border_belongs_to_the_answer(make_tokenizer):
    tokenizer = make_tokenizer(merges=[("Ċ", "R")])
    example = encode(row(), tokenizer, "alpaca", 512)
    assert tokenizer.decode(example["tokens"][example["answer"]]) == "\nRed.<eos>"


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_eos_is_learnt_also_when_it_is_the_padding(make_tokenizer, template):
    tokenizer = make_tokenizer(pad="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode(CHAT, tokenizer, template, 512)
    assert (example["tokens"][example["answer"]] == tokenizer.eos_token_id).sum() == 2
    batch = make_batches([example], batch_size=2, seed=0, buckets=[512])[0]
    learnt = batch["targets"][batch["weights"] > 0]
    assert (learnt == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(learnt) == "Un.<eos>Deux. é日<eos>"


def test_truncation_keeps_the_beginning(byte_tokenizer):
    whole = encode(row(), byte_tokenizer, "alpaca", 512)
    length = len(whole["tokens"])
    cut = encode(row(), byte_tokenizer, "alpaca", length - 2)
    assert cut["tokens"].tolist() == whole["tokens"][:-2].tolist()
    assert cut["answer"].sum() == len("Red.") - 1
    prompt = length - len("Red.") - 1
    assert encode(row(), byte_tokenizer, "alpaca", prompt + 1)["answer"].sum() == 1
    assert encode(row(), byte_tokenizer, "alpaca", prompt) is None


def test_counts(byte_tokenizer):
    rows = [row("a"), row("b", "x" * 50), row("c" * 99)]
    limit = 60
    examples, dropped = encode_rows(rows, byte_tokenizer, "chat", limit)
    assert (len(examples), dropped) == (2, Dropped(rows=3, truncated=1, no_answer=1))
    assert dropped.total == 1 and len(examples[1]["tokens"]) == limit
    examples, dropped = encode_rows(rows, byte_tokenizer, "chat", limit, too_long="drop")
    assert (len(examples), dropped) == (1, Dropped(rows=3, too_long=2))
    assert dropped.total == 2


def test_too_long_and_all_dropped_are_errors(byte_tokenizer):
    long = row("c" * 99, origin="data.jsonl:7")
    with pytest.raises(UserError, match=r"data\.jsonl:7: \d+ tokens, over the limit of 60"):
        encode_rows([row("a"), long], byte_tokenizer, "chat", 60, too_long="error")
    for policy in ("truncate", "drop"):
        with pytest.raises(UserError, match=r"2 of 2 do not fit 60 tokens \(the first, data\.jsonl:7, has 1\d\d"):
            encode_rows([long, long], byte_tokenizer, "chat", 60, too_long=policy)
    with pytest.raises(UserError, match="0 of 0"):
        encode_rows([], byte_tokenizer, "chat", 60)
    with pytest.raises(UserError, match="too_long is 'cut'; use one of truncate, drop, error"):
        encode_rows([long], byte_tokenizer, "chat", 60, too_long="cut")


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


@pytest.mark.parametrize(("n", "bucket"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 24)])
def test_the_smallest_bucket_is_taken(n, bucket):
    example = {"tokens": np.ones(n, np.int32), "answer": np.ones(n, bool)}
    batch = make_batches([example], batch_size=1, seed=0, buckets=[16, 24, 8])[0]
    assert batch["tokens"].shape == (1, bucket)
    assert lengths(batch) == [n]


def epoch_of(batches):
    pairs = [pair for b in batches for pair in zip(b["tokens"].tolist(), lengths(b), strict=True)]
    return [tuple(tokens[:n]) for tokens, n in pairs if n]


def test_epochs_hold_every_row_once_and_are_shuffled_anew(examples):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=3)
    assert len(batches) == 18
    epochs = [epoch_of(batches[start] for start in range(first, first + 6)) for first in (0, 6, 12)]
    everything = sorted(tuple(example["tokens"].tolist()) for example in examples)
    assert all(sorted(epoch) == everything for epoch in epochs)
    given = [tuple(example["tokens"].tolist()) for example in examples]
    assert all(a != b for a, b in itertools.combinations([*epochs, given], 2))
    assert [lengths(batches[last])[2:] for last in (5, 11, 17)] == [[0, 0]] * 3


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_random_access_is_deterministic_and_seeded(examples):
    one, again, other = (make_batches(examples, batch_size=4, seed=seed, buckets=[128], steps=15) for seed in (3, 3, 4))
    assert len(one) == 15
    forward = [one[step] for step in range(15)]
    assert all(same(forward[step], again[step]) for step in reversed(range(15)))
    assert not any(same(forward[step], other[step]) for step in range(5))
    epochs = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=3)
    assert all(same(forward[step], epochs[step]) for step in range(15))


def test_processes_share_a_batch_and_its_shape(examples):
    settings = {"batch_size": 4, "seed": 3, "buckets": [48, 64, 96], "epochs": 1}
    whole = make_batches(examples, **settings)
    parts = [make_batches(examples, **settings, rows=lambda n, i=i: np.arange(n // 2) + i * n // 2) for i in (0, 1)]
    for step in range(len(whole)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in ("tokens", "weights")}
        assert same(joined, {name: whole[step][name] for name in joined})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_iterator_goes_on_where_it_stopped(examples, prefetch):
    batches = make_batches(examples, batch_size=4, seed=3, buckets=[128], epochs=2)
    iterator = iterate(batches, prefetch)
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    rest = list(iterator)
    resumed = iterate(batches, prefetch)
    resumed.set_state(state)
    assert len(rest) == 5
    assert all(same(a, b) for a, b in zip(rest, resumed, strict=True))
    assert all(same(a, batches[step]) for step, a in enumerate(rest, start=7))


def test_bad_settings(examples):
    with pytest.raises(UserError, match="the largest bucket 32"):
        make_batches(examples, batch_size=4, seed=0, buckets=[16, 32])
    with pytest.raises(ValueError, match="epochs or steps, not both"):
        make_batches(examples, batch_size=4, seed=0, buckets=[128], epochs=1, steps=2)
