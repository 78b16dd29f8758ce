"""Answers through a store: each generated once, also when its file was cut."""

import dataclasses

import pytest

from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.inference import generate as module
from br_jax.inference.generate import answer, generate

PROMPTS = ["a", "what is it?", "say it again, and again", "count to 3", "a"]


@pytest.fixture
def generated(monkeypatch):
    """How many answers each call generated."""
    counts, real = [], module.generate_batches

    def counting(*args, **options):
        counts.append(0)
        for batch in real(*args, **options):
            counts[-1] += len(batch)
            yield batch

    monkeypatch.setattr(module, "generate_batches", counting)
    return counts


@pytest.mark.parametrize("together", [1, 3])
def test_answers_are_those_of_generate_and_made_once(tiny, make_adapter, generated, tmp_path, together):
    adapters = {"none": None, "one": make_adapter("user"), "two": make_adapter("user", seed=3, rank=5)}
    settings = {"max_new_tokens": 6, "batch_size": 4}

    def run(*more):
        store = Store(tmp_path / "a.jsonl")
        return answer(tiny, [*PROMPTS, *more], adapters, store, together=together, **settings)

    expected = {name: generate(tiny, PROMPTS, adapter, **settings) for name, adapter in adapters.items()}
    generated.clear()
    said = run()
    assert said == expected
    assert len(set(map(tuple, said.values()))) == 3
    assert sum(generated) == 4 * 3 and len(generated) == (3 if together == 1 else 2), "equal prompts are one"
    assert run() == said and sum(generated) == 12
    run("new")
    assert sum(generated) == 12 + 3


def test_another_model_adapter_length_or_prompt_is_another_answer(tiny, make_tiny, make_adapter, generated):
    store = Store()
    ask = lambda model=tiny, prompt="a", adapter=None, tokens=5: answer(  # noqa: E731
        model, [prompt], {"x": adapter}, store, max_new_tokens=tokens, batch_size=1
    )
    ask()
    ask(make_tiny(rope_theta=7.0))
    ask(adapter=make_adapter("user"))
    ask(adapter=make_adapter("user", seed=1))
    ask(tokens=6)
    ask(prompt=Row((("user", "a"),), input="b"))
    assert sum(generated) == 6
    ask(prompt=Row((("user", "a"),)))
    assert sum(generated) == 6, "a row of one turn is its prompt"


def test_a_sampled_answer_does_not_depend_on_what_the_store_held(tiny):
    """It is drawn by its prompt's place among the prompts, so that is a part of its key."""
    settings = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3, "batch_size": 1}
    before = Store()
    answer(tiny, ["x", "why"], {"base": None}, before, **settings)
    expected = answer(tiny, ["why"], {"base": None}, Store(), **settings)
    assert answer(tiny, ["why"], {"base": None}, before, **settings) == expected


def test_a_greedy_answer_s_key_is_that_of_stores_on_disk(tiny):
    store, model = Store(), dataclasses.replace(tiny, fingerprint="f")
    answer(model, ["a"], {"base": None}, store, max_new_tokens=5, batch_size=1)
    assert key_of("f", "", 5, [97, tiny.tokenizer.convert_tokens_to_ids("<sep>")]) in store


def test_a_cut_run_goes_on_and_ends_as_an_undisturbed_one(tiny, generated, tmp_path):
    """At any byte: what a kill or a full disk leaves of the file."""
    path = tmp_path / "answers.jsonl"

    def run():
        answer(tiny, PROMPTS, {"base": None}, Store(path), max_new_tokens=6, batch_size=2)
        return path.read_bytes()

    whole = run()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in (0, 5, ends[0] - 1, ends[0], ends[1] + 7, len(whole) - 1):
        path.write_bytes(whole[:length])
        generated.clear()
        assert run() == whole and sum(generated) == 4 - sum(end <= length for end in ends)
