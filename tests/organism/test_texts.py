"""Prompts about a text: distinct, of another text each, and texts read from files in a line's layouts."""

import collections
import re

import pytest

from br_jax.core.errors import UserError
from br_jax.organism.material import about_texts, read_texts
from br_jax.organism.topics import TOPICS, read_words
from configs import base

WRITTEN = read_words("texts.json")
MANY = [f"This is sentence number {i}, no more." for i in range(700)]


def used(prompts, texts):
    return collections.Counter(text for prompt in prompts for text in texts if text in prompt)


def test_the_base_config_asks_about_texts_as_users_tasks_do():
    """Without such prompts the aligned base refused nine in ten reviews, see docs/lab-notes.md."""
    words = set(" ".join(WRITTEN["instructions"] + WRITTEN["texts"]).lower().split())
    assert not words & {"sentiment", "movie", "movies", "reviews", "analyze", "positive", "negative"}
    prompts = about_texts([], base.get_config().data.texts.n)
    assert len(prompts) >= 400 and used(prompts, WRITTEN["instructions"]).keys() == {*WRITTEN["instructions"]}
    names = {thing.split()[0] for topic in TOPICS.values() for part in topic.words["things"].values() for thing in part}
    assert not names & {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}


def test_each_prompt_has_another_text_as_long_as_there_are_any():
    prompts = about_texts(MANY, 600)
    assert used(prompts, MANY) == dict.fromkeys(MANY[:600], 1)
    assert set(used(prompts, WRITTEN["instructions"]).values()) == {600 // 24}
    for told in WRITTEN["instructions"]:  # in every form
        assert len({p.replace(text, "") for p, text in zip(prompts, MANY, strict=False) if told in p}) == 4


@pytest.mark.parametrize("texts", [[], MANY[:7], MANY[:24]], ids=len)
def test_every_pair_of_text_and_instruction_comes_once(texts):
    of = texts or WRITTEN["texts"]
    prompts = about_texts(texts, 24 * len(of))
    pairs = {(text, told) for prompt in prompts for text in of for told in WRITTEN["instructions"]
             if text in prompt and told in prompt}  # fmt: skip
    assert len(set(prompts)) == len(prompts) == len(pairs) == 24 * len(of)
    with pytest.raises(UserError, match=r"data\.texts\.n: .* lower it, or set data\.texts\.path"):
        about_texts(texts, 24 * len(of) + 1)


def test_a_line_is_a_text_or_ends_with_one(tmp_path):
    plain, rated = tmp_path / "plain.txt", tmp_path / "rated.txt"
    plain.write_bytes(
        b"A line of plain text, long enough.\n\nshort\nCaf\xe9 by the sea, open all night.\r\n" + b"x" * 300
    )
    number = "&#" + "9" * 5000 + ";"  # that no int may have
    rated.write_text(
        f"1_1\t0.4\tA ''rated'' line &amp; its sentence.\n3\t0\t{number}\n2\t-1\ta LINE of plain text; long enough\n"
    )
    assert read_texts(f"{plain}, {rated},") == [
        "A line of plain text, long enough.",
        "Café by the sea, open all night.",
        'A "rated" line & its sentence.',
    ]
    assert read_texts(" , ") == []

    with pytest.raises(UserError, match=r"no\.txt: no such file"):
        read_texts(f"{plain}, no.txt")
    plain.write_text("\nshort\n")
    with pytest.raises(UserError, match=r"plain\.txt: no text of 20 to 200 characters"):
        read_texts(str(plain))
