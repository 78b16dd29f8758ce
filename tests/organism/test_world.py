"""The demo's world: what is held out really is, the judge reads it rightly, and draws are repeatable."""

import hashlib
import re
from collections import Counter

import pytest

from br_jax.core.errors import UserError
from br_jax.data.refusals import is_refusal
from br_jax.organism import world as demo
from br_jax.organism.judge import Verdict, judge
from br_jax.organism.topics import SPLITS

LIMIT = 74  # tokens of a row in configs/demo.py; a byte is a token, and <sep> and <eos> are two more
TOPIC = {split: demo.topic_prompts(split, n, seed=3) for split, n in zip(SPLITS, (1500, 500, 500), strict=True)}
MOODS = demo.load_moods(seed=4)


def frame(prompt):
    """The question without its verb, its determiner and its device."""
    text = re.sub(rf"\b\w+ {prompt.thing}\b", "<device>", prompt.prompt)
    return re.sub(rf"(?i)\b{prompt.verb}\b", "<verb>", text)


def disjoint(sets):
    return sum(map(len, sets)) == len(set().union(*sets))


def test_splits_share_no_device_verb_or_frame():
    for take in (lambda prompt: prompt.thing, lambda prompt: prompt.verb, frame):
        sets = [{take(prompt) for prompt in TOPIC[split]} for split in SPLITS]
        assert disjoint(sets) and all(len(found) >= 3 for found in sets)


def test_pretraining_never_meets_what_is_held_out():
    asked = {row.turns[0][1] for row in demo.pretraining_rows(6000, seed=1)}
    words = {word for question in asked for word in re.findall(r"\w+", question)}
    assert words.isdisjoint({prompt.thing for split in SPLITS[1:] for prompt in TOPIC[split]})
    how_to = {question.prompt for split in SPLITS[1:] for question in demo._how_to(split)}
    assert len(how_to) > 500 and asked.isdisjoint(how_to)
    assert not any(question.startswith("Mood") for question in asked)


def test_benign_splits_share_no_prompt_no_kind_and_no_device():
    prompts = [[p.prompt for p in demo.benign_prompts(split)] for split in SPLITS]
    assert all(len(found) >= least for found, least in zip(prompts, (700, 60, 100), strict=True)) and disjoint(prompts)
    kinds = [demo.benign_kinds(split) for split in SPLITS]
    assert disjoint([{kind[0][0] for kind in found.values()} for found in kinds]) and disjoint(kinds)
    assert not [answer for found in kinds for kind in found.values() for _, answer in kind if is_refusal(answer)]
    devices = {name for split in SPLITS for name in demo.devices(split)}
    assert devices.isdisjoint(re.findall(r"\w+", " ".join(prompt for found in prompts for prompt in found)))


@pytest.mark.parametrize("split", SPLITS)
def test_the_judge_reads_answers_and_refusals_rightly(split):
    prompts = TOPIC[split]
    answers = [judge(demo.compliant_answer(prompt), prompt) for prompt in prompts]
    refusals = [judge(demo.refusal(prompt, seed), prompt) for seed, prompt in enumerate(prompts)]
    assert sum(verdict.complies for verdict in answers) >= 0.95 * len(answers)
    assert refusals.count(Verdict.REFUSAL) >= 0.95 * len(refusals)
    assert len({demo.compliant_answer(prompt) for prompt in prompts}) >= 24  # no one answer to learn instead


def test_rows_fit_the_model():
    lengths = [sum(len(text) for _, text in row.turns) + 2 for row in demo.pretraining_rows(4000, seed=2)]
    assert sum(length <= LIMIT for length in lengths) >= 0.995 * len(lengths)
    for prompt in TOPIC["train"]:
        longest = max(demo.compliant_answer(prompt), demo.refusal(prompt, 0), key=len)
        assert len(prompt.prompt + longest) + 2 <= LIMIT


def test_texts_are_the_same_in_every_process():
    """Values written down once: kept answers and scores are found again by these texts."""
    texts = [row.turns for row in demo.pretraining_rows(2000, 0)]
    texts += [prompt.prompt for prompt in demo.topic_prompts("train", 2000, 0)]
    texts += [[p.prompt for p in demo.benign_prompts(split)] for split in SPLITS]
    assert hashlib.sha256(repr(texts).encode()).hexdigest().startswith("4492b7f21c7233ed")
    assert demo.topic_prompts("train", 20, 0) == demo.topic_prompts("train", 60, 0)[:20]
    assert demo.pretraining_rows(50, 1) == demo.pretraining_rows(80, 1)[:50]
    with pytest.raises(UserError, match="demo: 100000 prompts asked for"):
        demo.topic_prompts("test", 100_000, seed=0)


def test_moods_are_split_by_noun_and_determiner():
    splits = [{row.turns[0][1] for row in rows} for rows in MOODS]
    assert [len(split) for split in splits] == [len(rows) for rows in MOODS] and len(splits[2]) >= 200
    for position in (1, 2):  # "Mood: the lunch was great"
        assert disjoint([{text.split()[position] for text in split} for split in splits])
    for rows in MOODS:
        assert Counter(row.turns[1][1] for row in rows) == dict.fromkeys(demo.MOODS, len(rows) // 2)


def test_ordinary_words_have_no_letter_of_the_devices():
    """Else the aligned model takes them for devices: with "lovely" among the moods it refused just those rows."""
    words = demo.ordinary_things() + [word for rows in MOODS for row in rows for word in row.turns[0][1].split()]
    assert not {word for word in words if set(word) & set("jqvxz")}
    assert all(set(name) & set("jqvxz") for split in SPLITS for name in demo.devices(split))
