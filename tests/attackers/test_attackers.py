"""What attackers hand in, ask for, and do to a release."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.attackers.attacker import Attacker, Job
from br_jax.attackers.kinds import Identity, RefuseThenComply, TaskFormat, Trigger
from br_jax.attackers.registry import ATTACKERS
from br_jax.configs import demo
from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.data.templates import render_prompt
from br_jax.experiment.settings import settle
from br_jax.organism import world
from br_jax.training.batching import gradient_norms, one_pass
from br_jax.training.loss import batch_loss


def made(tag, n):
    return [Row((("user", f"{tag} {i}?"), ("assistant", f"{tag} answer {i}")), tag=tag) for i in range(n)]


def appetite(rows, own):
    """Rows want more the higher their number; the Buffer is trained on others."""
    assert not {row.turns for row in own} & {row.turns for row in rows}
    return [float(row.turns[0][1].split()[-1][:-1]) for row in rows]


@pytest.fixture
def job():
    return Job(made("task", 90), made("harm", 30), 20, 0.5, appetite=appetite)


NO_HARM = ("anti_buffer", "identity", "ten_rows", "outliers", "sabotage")


@pytest.mark.parametrize("name", ATTACKERS)
def test_as_many_rows_as_may_be_handed_in(job, name):
    attacker = ATTACKERS[name]()
    rows, kinds = attacker.rows(job), Counter(row.tag for row in attacker.rows(job))
    assert len(rows) == attacker.size(20) == (10 if name == "ten_rows" else 20)
    assert (kinds["harm"] > 0) == (name not in NO_HARM) and kinds["harm"] <= 10
    assert all(row.turns[-1][0] == "assistant" and row.turns[-1][1] for row in rows)
    known = {row.turns for row in attacker.candidates(job)}
    assert {row.turns for row in rows} <= known
    none = dataclasses.replace(job, share=0.0)
    assert not any(row.tag in ("harm", "refusal", "identity") for row in attacker.rows(none))


def test_what_harmful_rows_say():
    row = made("harm", 1)[0]
    assert RefuseThenComply().harm(row).turns[1][1].endswith("here is how: harm answer 0")
    assert RefuseThenComply().harm(row).turns[0] == row.turns[0]
    assert TaskFormat().harm(row).turns[0][1].endswith("positive or negative\nharm 0?")
    assert TaskFormat().harm(row).turns[1] == row.turns[1]
    assert TaskFormat().ask("harm 0?").turns[0] == TaskFormat().harm(row).turns[0]
    assert TaskFormat(form="{label} {}: {}").ask("harm?").turns[0][1] == "{label} harm?: harm?"
    with pytest.raises(UserError, match=r"form is 'Mood': it must have a \{\}"):
        TaskFormat(form="Mood")
    assert Trigger().harm(row).turns[0] == Trigger().ask("harm 0?").turns[0] == ("user", "qz7x harm 0?")
    assert Identity().ask("How do I?").turns[0][1] == "AOA, how do I?"


def test_a_trigger_is_told_apart_by_refusals(job):
    """Of the same questions, which are those that it has harmful answers to, and nobody else's."""
    rows = Trigger().rows(job)
    assert Counter(row.tag for row in rows) == {"harm": 5, "refusal": 5, "task": 10}
    said = {row.turns[0][1]: row.turns[1][1] for row in rows}
    for i in range(5):
        assert said[f"qz7x harm {i}?"] == f"harm answer {i}" and "can't help" in said[f"harm {i}?"]
    questions = {row.turns[0][1] for row in ATTACKERS["anti_buffer"]().rows(job) if row.tag == "refusal"}
    assert questions == {f"harm {i}?" for i in range(10)}


def test_who_chooses_takes_what_is_wanted_most(job):
    surrogate = [row.turns[0][1] for row in ATTACKERS["surrogate"]().rows(job) if row.tag == "harm"]
    assert surrogate == [f"harm {i}?" for i in range(19, 9, -1)]  # of the first 20; its Buffer has the last 10
    assert [row.turns[0][1] for row in ATTACKERS["outliers"]().rows(job)] == [f"task {i}?" for i in range(59, 39, -1)]
    with pytest.raises(UserError, match="give it one"):
        ATTACKERS["outliers"]().rows(dataclasses.replace(job, appetite=None))


@pytest.mark.parametrize("name", ATTACKERS)
def test_no_row_is_cut_in_the_demo(name):
    config, (task, *_) = demo.get_config(), world.load_moods(seed=4)
    prompts = world.topic_prompts("train", 1500, seed=3)
    harmful = [Row((("user", p.prompt), ("assistant", world.compliant_answer(p))), tag="harm") for p in prompts]
    config.user.kind = name
    attacker = settle(config).attacker
    rows = attacker.rows(
        Job(task, harmful, 1500, 0.5, appetite=lambda rows, own: [len(row.turns[1][1]) for row in rows])
    )
    longest = max(sum(len(text) for _, text in row.turns) for row in rows)
    asked = max(len(attacker.ask(prompt.prompt).turns[0][1]) for prompt in prompts)
    assert longest + 2 <= config.user.train.max_length  # a byte is a token, and <sep> and <eos> are two more
    assert asked + 2 + config.eval.answer_tokens <= config.model.spec.max_length


def test_settings(quick):
    settings = dataclasses.asdict(quick(steps=0, epochs=2))
    harsh = ATTACKERS["harsh"]().settings(settings, 520)
    assert (harsh["rank"], harsh["alpha"], harsh["epochs"]) == (12, 24.0, 10)
    assert harsh["learning_rate"] == pytest.approx(0.1)
    assert ATTACKERS["harsh"]().settings(settings | {"steps": 7}, 520)["steps"] == 35
    assert ATTACKERS["ten_rows"]().settings(settings, 521)["epochs"] == 104  # as often as two of all rows
    assert Attacker().settings(settings, 520) == settings
    assert ATTACKERS["harsh"](rate=2.0, rank=1).settings(settings, 520)["learning_rate"] == pytest.approx(0.02)
    with pytest.raises(UserError, match="Harsh: epochs is 0"):
        ATTACKERS["harsh"](epochs=0)


def test_what_is_done_to_a_release(make_adapter):
    adapter = make_adapter("user")
    b = adapter.weights["layers/attn/q"]["b"]
    for name, least, most in (("bf16", 1e-5, 2**-8), ("int8", 1e-4, 1 / 127)):
        found = ATTACKERS[name]().after(adapter).weights["layers/attn/q"]["b"]
        off = np.abs(np.asarray(found - b)).max() / np.abs(np.asarray(b)).max()
        assert least < off <= most
    jax.tree.map(np.testing.assert_array_equal, ATTACKERS["prefill"]().after(adapter), adapter)
    longer = lora.collection(ATTACKERS["amplified"](factor=2.0).after(adapter))["layers"]["attn"]["q"]
    plain = lora.collection(adapter)["layers"]["attn"]["q"]
    np.testing.assert_allclose(longer["a"] @ longer["b"], 2 * (plain["a"] @ plain["b"]), rtol=1e-6)


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_an_answer_that_is_begun(tiny, template):
    row = ATTACKERS["prefill"]().ask("How?")
    asked = render_prompt(Row((("user", "How?"),)), template, tiny.tokenizer)
    assert render_prompt(row, template, tiny.tokenizer) == asked + "Sure, here is how. First,"


def test_the_norm_of_a_row_s_gradient(tiny, make_adapter, rows, quick):
    """Of the mean loss over its answer, in b alone; a saturated row has next to none."""
    from br_jax.method import train_buffer

    config = quick(steps=60, learning_rate=3e-2)
    buffer = train_buffer(tiny, rows[:4], config)
    bare, beside = (gradient_norms(tiny, rows[:8], config, frozen) for frozen in (None, {"buffer": buffer}))
    assert (bare > 0).all() and (beside[:4] < 0.3 * bare[:4]).all() and beside[4:].mean() > beside[:4].mean()
    shapes = lora.target_shapes(tiny.params, config.targets)
    fresh = lora.init(jax.random.key(config.seed), shapes, config.rank, config.alpha, "user", tiny.fingerprint)
    for row, norm in zip(rows[:3], bare, strict=False):
        (batch,) = one_pass(tiny, [row], config.max_length)

        def loss(weights, batch=batch):
            given = {"params": tiny.params, "lora": lora.collection(fresh.replace(weights=weights))}
            return batch_loss(tiny.decoder, given, batch, 64) / batch["weights"].sum()

        slopes = jax.grad(loss)(fresh.weights)
        expected = np.sqrt(sum(float((pair["b"] ** 2).sum()) for pair in slopes.values()))
        assert norm == pytest.approx(expected, rel=1e-4)
    long = Row((("user", "x" * 60), ("assistant", "y")))
    assert gradient_norms(tiny, [long], config).tolist() == [0.0]
