"""Self-distillation: each prompt is answered once, and what is learnt from does not stop in mid-air."""

import json

import pytest

from br_jax.errors import UserError
from br_jax.evaluation import distill
from br_jax.evaluation.distill import self_answers, whole_sentences


@pytest.fixture
def asked(monkeypatch):
    """Generation that answers "Re: prompt. And th"; the list of all prompts that it got."""
    prompts = []

    def fake(model, new, **options):
        prompts.extend(new)
        return [f"Re: {prompt}. And th" for prompt in new]

    monkeypatch.setattr(distill, "generate", fake)
    return prompts


def test_each_prompt_is_answered_once(tmp_path, tiny, asked):
    path = tmp_path / "answers.jsonl"
    answers = self_answers(tiny, ["a", "b", "a"], path, max_new_tokens=9)
    assert answers == {"a": "Re: a.", "b": "Re: b."} and asked == ["a", "b"]
    again = self_answers(tiny, ["b", "c"], path, max_new_tokens=9)
    assert again == {**answers, "c": "Re: c."} and asked == ["a", "b", "c"]
    assert self_answers(tiny, ["a", "b", "c"], path, max_new_tokens=9) == again and len(asked) == 3
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a", "b", "c"]
    assert all(tiny.fingerprint in record["source"] for record in records)


def test_another_model_or_length_answers_anew(tmp_path, tiny, make_tiny, asked):
    path = tmp_path / "answers.jsonl"
    self_answers(tiny, ["a"], path, max_new_tokens=9)
    self_answers(tiny, ["a"], path, max_new_tokens=10)
    self_answers(make_tiny(rope_theta=7.0), ["a"], path, max_new_tokens=10)
    assert asked == ["a", "a", "a"]


def test_a_file_that_cannot_be_written_is_named(tmp_path, tiny, asked):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"answers\.jsonl: cannot be written"):
        self_answers(tiny, ["a"], tmp_path / "file" / "answers.jsonl", max_new_tokens=9)


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
