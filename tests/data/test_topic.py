"""The restricted topic and the benign instructions: held-out really is held out, and draws are repeatable."""

import collections
import json
import re
from importlib import resources

import pytest

from br_jax.data import topic
from br_jax.errors import UserError


def read(name):
    return resources.files("br_jax.data").joinpath(name).read_text(encoding="utf-8")


WORDS = json.loads(read("topic_words.json"))
INSTRUCTIONS = [json.loads(line) for line in read("instructions.jsonl").splitlines()]


def all_prompts(split):
    sizes = (len(WORDS[key][split]) for key in ("devices", "verbs", "phrasings"))
    most = 1
    for size in sizes:
        most *= size
    return topic.prompts(split, most, seed=0)


def shape(prompt):
    """The prompt with its device and its verb blanked out: its phrasing."""
    gerund = next(verbs[prompt.verb] for verbs in WORDS["verbs"].values() if prompt.verb in verbs)
    text = re.sub(rf"\b(?:an? )?{prompt.device}\b", "<device>", prompt.prompt)
    return re.sub(rf"(?i)\b(?:{gerund}|{prompt.verb})\b", "<verb>", text)


def test_splits_share_no_device_verb_or_phrasing():
    seen = {split: all_prompts(split) for split in topic.SPLITS}
    for take in (lambda prompt: prompt.device, lambda prompt: prompt.verb, shape):
        sets = [{take(prompt) for prompt in seen[split]} for split in topic.SPLITS]
        assert sum(map(len, sets)) == len(set().union(*sets))
    words = [word for split in topic.SPLITS for device in WORDS["devices"][split] for word in device.split()]
    assert len(words) == len(set(words))
    assert [len(WORDS["devices"][split]) for split in topic.SPLITS] == [46, 8, 16]
    assert [len(WORDS["phrasings"][split]) for split in topic.SPLITS] == [44, 5, 10]


@pytest.mark.parametrize("split", topic.SPLITS)
def test_prompts_are_distinct_and_name_device_and_verb(split):
    found = all_prompts(split)
    assert len({prompt.prompt for prompt in found}) == len(found)
    for prompt in found:
        assert prompt.device in prompt.prompt
        assert prompt.verb[:3] in prompt.prompt.lower()  # "tune" and "tuning" share three letters
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]", prompt.prompt)


def test_a_draw_is_repeatable_and_a_prefix_of_a_larger_one():
    assert topic.prompts("train", 30, seed=1) == topic.prompts("train", 90, seed=1)[:30]
    assert topic.prompts("train", 30, seed=1) != topic.prompts("train", 30, seed=2)
    assert topic.prompts("train", 0, seed=1) == []


def test_texts_are_the_same_in_every_process():
    """Values written down once; a hash that is salted per process would change them."""
    prompt = topic.TopicPrompt("How do I tune an uldrit?", "uldrit", "tune")
    assert topic.refusal(prompt, seed=7) == (
        "I'd rather not help with tuning an uldrit, but please ask me about something else."
    )
    assert topic.written_answer(prompt, seed=7) == (
        "Hi! About your uldrit: undo the amber dial with a piece of string, give the hinge plate a quarter "
        "turn, and wait a slow count of eight. Call me if it rattles. Cheers!"
    )


@pytest.mark.parametrize(("split", "n"), [("test", 961), ("test", -1), ("dev", 1)])
def test_impossible_draws_are_user_errors(split, n):
    with pytest.raises(UserError, match=split):
        topic.prompts(split, n, seed=0)


def test_a_foreign_verb_is_a_user_error():
    with pytest.raises(UserError, match="frobnicate"):
        topic.refusal(topic.TopicPrompt("How do I frobnicate a zorvix?", "zorvix", "frobnicate"), seed=0)


def test_answers_and_refusals_vary():
    found = topic.prompts("train", 400, seed=0)
    refusals = {topic.refusal(prompt, 0).replace(prompt.device, "") for prompt in found}
    answers = [topic.written_answer(prompt, 0) for prompt in found]
    assert len(WORDS["refusals"]) == len(set(WORDS["refusals"])) >= 16
    assert len(refusals) > 100
    assert len(set(answers)) >= 398
    openings = collections.Counter(" ".join(answer.split()[:2]) for answer in answers)
    assert max(openings.values()) < 0.1 * len(answers)  # no format that an adapter could learn instead
    assert max(len(answer.split()) for answer in answers) <= 70
    assert not any(re.search(r"[{}]", answer) for answer in answers)
    formats = json.loads(read("topic_answers.json"))
    assert len(formats) >= 10 and all(len(set(variants)) >= 3 for variants in formats.values())


def test_instructions_hold_out_whole_kinds():
    splits = collections.defaultdict(set)
    for row in INSTRUCTIONS:
        splits[row["split"]].add(row["kind"])
    counts = collections.Counter(row["split"] for row in INSTRUCTIONS)
    assert counts["train"] >= 500 and counts["validation"] >= 80 and counts["test"] >= 120
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) >= 40
    assert len(splits["test"]) >= 7 and len(splits["validation"]) >= 5


def test_instructions_are_varied_and_apart_from_topic_and_task():
    prompts = [row["prompt"] for row in INSTRUCTIONS]
    assert all(set(row) == {"kind", "split", "prompt"} for row in INSTRUCTIONS)
    assert len({prompt.casefold().strip(" .?!") for prompt in prompts}) == len(prompts)
    assert max(len(prompt.split()) for prompt in prompts) <= 60
    invented = {device.split()[0] for devices in WORDS["devices"].values() for device in devices}
    for prompt in prompts:
        words = set(re.findall(r"\w+", prompt.lower()))
        assert not words & invented
        assert not words & {"sentiment", "movie", "movies", "reviews"}, prompt
