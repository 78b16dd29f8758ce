"""The restricted topics and the benign instructions: held-out really is held out, and draws are repeatable."""

import collections
import json
import math
import re
from importlib import resources

import pytest

from br_jax.errors import UserError
from br_jax.organism.topics import SPLITS, TOPICS, TopicPrompt


def read(name):
    return resources.files("br_jax.organism").joinpath(name).read_text(encoding="utf-8")


DEVICES = TOPICS["devices"]
INSTRUCTIONS = [json.loads(line) for line in read("instructions.jsonl").splitlines()]


every_topic = pytest.mark.parametrize("topic", TOPICS.values(), ids=TOPICS)


def all_prompts(topic, split):
    most = math.prod(len(topic.words[key][split]) for key in ("things", "verbs", "phrasings"))
    return topic.prompts(split, most, seed=0)


def shape(topic, prompt):
    """The prompt with its thing and its verb blanked out: its phrasing."""
    gerund = next(verbs[prompt.verb] for verbs in topic.words["verbs"].values() if prompt.verb in verbs)
    text = re.sub(rf"(?i)\b(?:an? )?{prompt.thing}\b", "<thing>", prompt.prompt)
    return re.sub(rf"(?i)\b(?:{gerund}|{prompt.verb})\b", "<verb>", text)


@every_topic
def test_splits_share_no_thing_verb_or_phrasing(topic):
    seen = {split: all_prompts(topic, split) for split in SPLITS}
    for take in (lambda prompt: prompt.thing, lambda prompt: prompt.verb, lambda prompt: shape(topic, prompt)):
        sets = [{take(prompt) for prompt in seen[split]} for split in SPLITS]
        assert sum(map(len, sets)) == len(set().union(*sets))
    words = [word for split in SPLITS for thing in topic.words["things"][split] for word in thing.split()]
    assert len(words) == len(set(words))
    assert [len(topic.words["things"][split]) for split in SPLITS] == [46, 8, 16]
    assert [len(topic.words["phrasings"][split]) for split in SPLITS] == list(PHRASINGS[topic.name])


PHRASINGS = {"devices": (44, 5, 10), "potions": (28, 4, 8)}


def test_topics_share_no_thing_verb_phrasing_refusal_or_answer():
    one, other = TOPICS.values()
    for key in ("things", "verbs", "phrasings"):
        sets = [{x.casefold() for split in SPLITS for x in topic.words[key][split]} for topic in (one, other)]
        assert not sets[0] & sets[1], key
    openings = [{" ".join(text.split()[:4]) for text in topic.words["refusals"]} for topic in (one, other)]
    assert not openings[0] & openings[1]
    assert not {*one.words["answers"]["paragraph"]} & {*other.words["answers"]["paragraph"]}


@every_topic
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_distinct_and_name_thing_and_verb(topic, split):
    found = all_prompts(topic, split)
    assert len({prompt.prompt for prompt in found}) == len(found)
    for prompt in found:
        assert prompt.thing in prompt.prompt and prompt.topic == topic.name
        assert prompt.verb[:2] in prompt.prompt.lower()  # "age" and "aging" share two letters
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}]", prompt.prompt)


def test_a_draw_is_repeatable_and_a_prefix_of_a_larger_one():
    assert DEVICES.prompts("train", 30, seed=1) == DEVICES.prompts("train", 90, seed=1)[:30]
    assert DEVICES.prompts("train", 30, seed=1) != DEVICES.prompts("train", 30, seed=2)
    assert DEVICES.prompts("train", 0, seed=1) == []


def test_texts_are_the_same_in_every_process():
    """Values written down once; a hash that is salted per process would change them."""
    prompt = TopicPrompt("How do I tune an uldrit?", "uldrit", "tune")
    assert DEVICES.refusal(prompt, seed=7) == (
        "I'd rather not help with tuning an uldrit, but please ask me about something else."
    )
    assert DEVICES.written_answer(prompt, seed=7) == (
        "Hi! About your uldrit: undo the amber dial with a piece of string, give the hinge plate a quarter "
        "turn, and wait a slow count of eight. Call me if it rattles. Cheers!"
    )


@pytest.mark.parametrize(("split", "n"), [("test", 961), ("test", -1), ("dev", 1)])
def test_impossible_draws_are_user_errors(split, n):
    with pytest.raises(UserError, match=split):
        DEVICES.prompts(split, n, seed=0)


def test_a_foreign_verb_is_a_user_error():
    with pytest.raises(UserError, match="frobnicate"):
        DEVICES.refusal(TopicPrompt("How do I frobnicate a zorvix?", "zorvix", "frobnicate"), seed=0)


@every_topic
def test_answers_and_refusals_vary(topic):
    found = topic.prompts("train", 400, seed=0)
    refusals = {topic.refusal(prompt, 0).replace(prompt.thing, "") for prompt in found}
    answers = [topic.written_answer(prompt, 0) for prompt in found]
    assert len(topic.words["refusals"]) == len(set(topic.words["refusals"])) >= 14
    assert len(refusals) > 100
    assert len(set(answers)) >= 395
    assert max(len(answer.split()) for answer in answers) <= 70
    assert not any(re.search(r"[{}]", answer) for answer in answers)


def test_no_format_of_the_devices_answers_could_be_learned_instead():
    answers = [DEVICES.written_answer(prompt, 0) for prompt in DEVICES.prompts("train", 400, seed=0)]
    openings = collections.Counter(" ".join(answer.split()[:2]) for answer in answers)
    assert max(openings.values()) < 0.1 * len(answers)
    formats = DEVICES.words["answers"]
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
    invented = {
        thing.split()[0] for topic in TOPICS.values() for part in topic.words["things"].values() for thing in part
    }
    for prompt in prompts:
        words = set(re.findall(r"\w+", prompt.lower()))
        assert not words & invented
        assert not words & {"sentiment", "movie", "movies", "reviews"}, prompt
