"""Self-distillation: each prompt is answered once, and what is learnt from does not stop in mid-air."""

import pytest

from br_jax.evaluation import distill
from br_jax.evaluation.distill import self_answers, whole_sentences
from br_jax.evaluation.store import Store


def test_answers_are_cut_and_kept(tmp_path, tiny, monkeypatch):
    asked = []

    def fake(model, prompts, adapters, store, **options):
        asked.append((model, prompts, adapters, options["max_new_tokens"]))
        return {"raw": [f"Re: {prompt}. And th" for prompt in prompts]}

    monkeypatch.setattr(distill, "answer", fake)
    assert self_answers(tiny, ["a", "b", "a"], Store(), max_new_tokens=9) == {"a": "Re: a.", "b": "Re: b."}
    assert asked == [(tiny, ["a", "b", "a"], {"raw": None}, 9)]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One. Two. Thr", "One. Two."),
        ("One. Two.", "One. Two."),
        ("no end at all", "no end at all"),
        ("  Is it? Yes! But", "Is it? Yes!"),
        ('He said "no." and th', 'He said "no."'),
        ("It costs 3.50 in", "It costs 3.50 in"),
        ("Do this: 1. Cut. 2. Gl", "Do this: 1. Cut."),
        ("1. Cut it", "1. Cut it"),
        ("", ""),
    ],
)
def test_whole_sentences(text, cut):
    assert whole_sentences(text) == cut
