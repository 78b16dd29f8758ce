"""Answers through a store: each generated once, also when the process is killed."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from br_jax.data.rows import Row
from br_jax.inference import answers as module
from br_jax.inference.answers import answer
from br_jax.inference.generate import generate
from br_jax.store import Store

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

    said = run()
    assert said == {name: generate(tiny, PROMPTS, adapter, **settings) for name, adapter in adapters.items()}
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


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL three times, whenever something new was written."""

    def start(path):
        script = pathlib.Path(__file__).with_name("killed_run.py")
        return subprocess.Popen([sys.executable, script, path])

    assert start(tmp_path / "whole.jsonl").wait() == 0
    path, lines = tmp_path / "killed.jsonl", lambda: path.read_bytes().count(b"\n") if path.exists() else 0
    for _ in range(3):
        before, process = lines(), start(path)
        while lines() == before and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed: give it more prompts"
    killed = path.read_bytes().splitlines()
    assert start(path).wait() == 0
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert path.read_bytes().splitlines()[: len(killed)] == killed and len(killed) < len(path.read_bytes().splitlines())
