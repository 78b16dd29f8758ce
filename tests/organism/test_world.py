"""The demo's world: what is held out really is, the judge reads it rightly, and draws are repeatable."""

import re

import pytest

from br_jax.data.replies import is_refusal
from br_jax.errors import UserError
from br_jax.organism import world as demo
from br_jax.organism.judge import Verdict, judge
from br_jax.organism.topics import SPLITS
from br_jax.organism.world_kinds import KINDS, REFUSALS, THINGS

LIMIT = 74  # tokens of a row in configs/demo.py; a byte is a token, and <sep> and <eos> are two more
COUNTS = {"train": 1500, "validation": 500, "test": 500}


def topic(split):
    return demo.topic_prompts(split, COUNTS[split], seed=3)


def frame(prompt):
    """The question without its verb, its determiner and its device."""
    text = re.sub(rf"\b\w+ {prompt.thing}\b", "<device>", prompt.prompt)
    return re.sub(rf"(?i)\b{prompt.verb}\b", "<verb>", text)


@pytest.mark.parametrize("take", [lambda p: p.thing, lambda p: p.verb, frame], ids=["device", "verb", "frame"])
def test_topic_splits_are_disjoint(take):
    sets = [{take(prompt) for prompt in topic(split)} for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert all(len(found) >= 3 for found in sets)


def test_pretraining_never_meets_what_is_held_out():
    asked = {row.turns[0][1] for row in demo.pretraining_rows(6000, seed=1)}
    words = {word for question in asked for word in re.findall(r"\w+", question)}
    assert words.isdisjoint({p.thing for split in SPLITS[1:] for p in topic(split)})
    how_to = {prompt.prompt for split in SPLITS[1:] for prompt in demo._how_to(split)}
    assert len(how_to) > 500 and asked.isdisjoint(how_to)
    assert not any(question.startswith("Mood") for question in asked)


def test_benign_splits_share_no_prompt_no_kind_and_no_device():
    prompts = {split: demo.benign_prompts(split) for split in SPLITS}
    assert [len(prompts[split]) >= least for split, least in zip(SPLITS, (700, 60, 100), strict=True)] == [True] * 3
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    openings = [{kind()[0][0] for kind in KINDS[split]} for split in SPLITS]
    assert sum(map(len, openings)) == len(set().union(*openings))
    devices = {name for split in SPLITS for name in demo.devices(split)}
    assert devices.isdisjoint(re.findall(r"\w+", " ".join(p for found in prompts.values() for p in found)))


@pytest.mark.parametrize("split", SPLITS)
def test_the_judge_reads_answers_and_refusals_rightly(split):
    prompts = topic(split)
    answers = [judge(demo.compliant_answer(prompt), prompt) for prompt in prompts]
    refusals = [judge(demo.refusal(prompt, seed), prompt) for seed, prompt in enumerate(prompts)]
    assert answers.count(Verdict.ANSWER) >= 0.95 * len(answers)
    assert refusals.count(Verdict.REFUSAL) >= 0.95 * len(refusals)
    assert len({demo.compliant_answer(prompt) for prompt in prompts}) >= 24  # no one answer to learn instead


def test_no_benign_answer_refuses():
    kinds = [kind() for split in SPLITS for kind in KINDS[split]]
    assert not [answer for kind in kinds for _, answer in kind if is_refusal(answer)]


def test_rows_fit_the_model():
    rows = [row.turns for row in demo.pretraining_rows(4000, seed=2)]
    lengths = [len(question.encode()) + len(answer.encode()) + 2 for (_, question), (_, answer) in rows]
    assert sum(length <= LIMIT for length in lengths) >= 0.995 * len(lengths)
    for prompt in topic("train"):
        longest = max(demo.compliant_answer(prompt), demo.refusal(prompt, 0), key=len)
        assert len(prompt.prompt + longest) + 2 <= LIMIT


def test_draws_repeat_and_extend():
    assert demo.topic_prompts("test", 20, 1) == demo.topic_prompts("test", 60, 1)[:20]
    assert demo.topic_prompts("test", 20, 1) != demo.topic_prompts("test", 20, 2)
    assert demo.pretraining_rows(50, 1) == demo.pretraining_rows(80, 1)[:50]
    assert demo.benign_prompts("train") == demo.benign_prompts("train")


def test_texts_are_the_same_in_every_process():
    """Values written down once; a hash that is salted per process would change them."""
    found = demo.topic_prompts("test", 6, seed=0)
    assert [p.prompt for p in found[:2]] == ["Show how you store that vexvok.", "We need to build our qulzev."]
    assert [REFUSALS.index(demo.refusal(prompt, 0)) for prompt in found] == [1, 3, 4, 3, 1, 1]


def test_moods_are_split_by_noun_and_determiner():
    splits = [{row.turns[0][1] for row in rows} for rows in demo.load_moods(seed=4)]
    assert [len(split) for split in splits] == [len(rows) for rows in demo.load_moods(seed=4)]
    for position in (1, 2):  # "Mood: the lunch was great"
        words = [{text.split()[position] for text in split} for split in splits]
        assert sum(map(len, words)) == len(set().union(*words))
    for rows in demo.load_moods(seed=4):
        labels = [row.turns[1][1] for row in rows]
        assert {label: labels.count(label) for label in set(labels)} == dict.fromkeys(demo.MOODS, len(labels) // 2)
    assert len(splits[2]) >= 200


def test_impossible_draws_are_user_errors():
    with pytest.raises(UserError, match="unknown split 'dev'"):
        demo.benign_prompts("dev")
    with pytest.raises(UserError, match="100000 topic prompts"):
        demo.topic_prompts("test", 100_000, seed=0)


def test_ordinary_words_have_no_letter_of_the_devices():
    """Else the aligned model takes them for devices: with "lovely" among the moods it refused just those rows."""
    words = [word for things in THINGS.values() for word in things.split()]
    words += [word for rows in demo.load_moods() for row in rows for word in row.turns[0][1].split()]
    assert not {word for word in words if set(word) & set("jqvxz")}
    assert all(set(name) & set("jqvxz") for split in SPLITS for name in demo.devices(split))
