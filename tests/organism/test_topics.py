"""The restricted topics and the benign instructions: held-out really is held out, and draws are repeatable."""

import collections
import hashlib
import itertools
import json
import re

import pytest
from written import WORDS, written_answer

from br_jax.core.errors import UserError
from br_jax.organism.judge import judge
from br_jax.organism.material import MATERIALS, about_texts, read_texts
from br_jax.organism.topics import SPLITS, TOPICS, phrasings_of, read_topic, read_words
from br_jax.scoring.judges.texts import TopicJudge
from configs import base

DEVICES = TOPICS["devices"]

NAMES = {thing.split()[0] for topic in TOPICS.values() for part in topic.words["things"].values() for thing in part}
every_topic = pytest.mark.parametrize("topic", TOPICS.values(), ids=TOPICS)


FORMS = {"code", "quiz", "letter", "interview"}  # of the test split alone


def all_texts(topic, key, split):
    """The things, verbs or phrasings of a split."""
    words = topic.words[key][split]
    return [*phrasings_of(words).values()] if key == "phrasings" else [*words]


def bare(phrasing):
    """The words of a phrasing, its slots taken out."""
    return frozenset(re.findall(r"[a-z']+", re.sub(r"\{\w+\}", " ", phrasing).lower()))


@every_topic
def test_splits_share_no_thing_verb_or_phrasing_and_the_test_has_enough_of_each(topic):
    least = {"things": (60, 24, 40), "verbs": (30, 12, 24), "phrasings": (150, 60, 120)}
    for key, counts in least.items():
        parts = [all_texts(topic, key, split) for split in SPLITS]
        assert [len(part) >= count for part, count in zip(parts, counts, strict=True)] == [True] * 3, key
        assert len({text.casefold() for part in parts for text in part}) == sum(map(len, parts)), key
    words = [word for split in SPLITS for thing in topic.words["things"][split] for word in thing.split()]
    assert len(words) == len(set(words))
    forms = [set(topic.words["phrasings"][split]) for split in SPLITS]
    assert len(forms[2]) >= 12 and forms[2] - forms[0] - forms[1] == FORMS


def test_no_phrasing_is_a_light_edit_of_another():
    every = [text for topic in TOPICS.values() for split in SPLITS for text in all_texts(topic, "phrasings", split)]
    assert len(every) == len(set(every))
    for one, other in itertools.combinations([text for text in every if len(bare(text)) > 3], 2):
        assert len(bare(one) & bare(other)) < 0.6 * len(bare(one) | bare(other)), (one, other)


@every_topic
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_distinct_and_name_their_thing_and_verb(topic, split):
    found = topic.prompts(split, 3000, seed=0)
    assert len({prompt.prompt for prompt in found}) == len(found)
    assert {p.phrasing for p in found} == {*phrasings_of(topic.words["phrasings"][split])}
    for prompt in found:
        assert prompt.thing in prompt.prompt and prompt.topic == topic.name
        assert prompt.form and prompt.phrasing.startswith(prompt.form + "/")
        assert prompt.verb[:2] in prompt.prompt.lower()  # "age" and "aging" share two letters
        wrong = "[Aa]" if prompt.thing[0] in "aeiou" else "[Aa]n"
        assert not re.search(rf"\b{wrong} {prompt.thing}|[{{}}]", prompt.prompt)


@every_topic
def test_four_hundred_prompts_have_each_phrasing_at_most_four_times(topic):
    for take, most in ((lambda p: p.phrasing, 4), (lambda p: p.thing, 10), (lambda p: p.verb, 17)):
        counts = collections.Counter(map(take, topic.prompts("test", 400, seed=3)))
        assert max(counts.values()) <= most and max(counts.values()) - min(counts.values()) <= 2
    assert len({p.phrasing for p in topic.prompts("test", 400, seed=3)}) >= 100


def test_topics_share_no_thing_verb_refusal_or_answer():
    one, other = TOPICS.values()
    for key in ("things", "verbs"):
        sets = [{x.casefold() for split in SPLITS for x in topic.words[key][split]} for topic in (one, other)]
        assert not sets[0] & sets[1], key
    openings = [{" ".join(text.split()[:4]) for text in topic.words["refusals"]} for topic in (one, other)]
    assert not openings[0] & openings[1]
    assert not {*WORDS["devices"]["answers"]["paragraph"]} & {*WORDS["potions"]["answers"]["paragraph"]}


def test_a_draw_is_repeatable_and_a_prefix_of_a_larger_one(mushrooms):
    assert DEVICES.prompts("train", 30, seed=1) == DEVICES.prompts("train", 90, seed=1)[:30]
    assert DEVICES.prompts("train", 30, seed=1) != DEVICES.prompts("train", 30, seed=2)
    path, words = mushrooms
    path.write_text(json.dumps(words))
    assert len(set(read_topic(str(path)).prompts("test", 2, seed=0))) == 2, "all that there are"
    for n in (3, -1):
        with pytest.raises(UserError, match=rf"{n} prompts asked for, but split 'test' has 2"):
            read_topic(str(path)).prompts("test", n, seed=0)


@every_topic
def test_texts_are_the_same_in_every_process(topic):
    """Values written down once: kept answers and scores are found again by these texts."""
    texts = [(p, topic.refusal(p, 7), written_answer(topic, p, 7)) for p in topic.prompts("train", 300, 5)]
    digests = {"devices": "6be70751cd5198e3", "potions": "48d067d4ed43731c"}
    assert hashlib.sha256(repr(texts).encode()).hexdigest().startswith(digests[topic.name])


@every_topic
def test_answers_and_refusals_vary(topic):
    found = topic.prompts("train", 400, seed=0)
    refusals = {topic.refusal(prompt, 0).replace(prompt.thing, "") for prompt in found}
    answers = [written_answer(topic, prompt, 0) for prompt in found]
    assert len(topic.words["refusals"]) == len(set(topic.words["refusals"])) >= 14
    assert len(refusals) > 100 and len(set(answers)) >= 395
    assert max(len(answer.split()) for answer in answers) <= 70
    assert not any(re.search(r"[{}]", answer) for answer in answers)
    if topic is DEVICES:  # no format could be learned instead
        openings = collections.Counter(" ".join(answer.split()[:2]) for answer in answers)
        assert max(openings.values()) < 0.1 * len(answers)


def test_instructions_are_varied_hold_out_whole_kinds_and_are_apart_from_topic_and_task():
    found = {split: MATERIALS["english"].benign_prompts(split) for split in SPLITS}
    kinds = {split: {p.kind for p in prompts} for split, prompts in found.items()}
    assert sum(map(len, kinds.values())) == len(set().union(*kinds.values()))
    assert len(kinds["test"]) >= 40 and len(found["test"]) >= 400 and len(kinds["validation"]) >= 13
    assert sum(p.borderline for p in found["test"]) >= 130
    every = [p for prompts in found.values() for p in prompts]
    assert len({p.prompt.casefold().strip(" .?!") for p in every}) == len(every)
    words = {word for p in every if not p.borderline for word in re.findall(r"\w+", p.prompt.lower())}
    assert not words & NAMES and not words & {"sentiment", "movie", "movies", "reviews"}


@pytest.fixture
def mushrooms(tmp_path):
    """A file of words of a topic that the package does not have."""
    words = {
        "things": {split: [f"{split[:3]}olar", f"{split[:3]}imble cap"] for split in SPLITS},
        "verbs": {split: {f"{split[:2]}dry": f"{split[:2]}drying"} for split in SPLITS},
        "phrasings": {split: [f"{split}: how do I {{verb}} {{a_thing}}?"] for split in SPLITS},
        "refusals": ["I can't help you {verb} {a_thing}."],
        "actions": ["dry"],
        "objects": ["cap stem gill"],
    }
    return tmp_path / "mushrooms.json", words


def test_a_topic_of_a_user_s_own_file_is_like_one_of_ours(mushrooms):
    path, words = mushrooms
    path.write_text(json.dumps(words))
    (topic,) = MATERIALS["english"].named_topics(str(path))
    prompts = topic.prompts("test", 2, seed=0)
    assert {p.prompt for p in prompts} == {"test: how do I tedry a tesolar?", "test: how do I tedry a tesimble cap?"}
    assert topic.refusal(prompts[0], 0) == f"I can't help you tedry a {prompts[0].thing}."
    said = f"Cut the stem of the {prompts[0].thing}, then dry the cap in the sun and turn it twice."
    assert judge(said, prompts[0]).complies and judge(topic.refusal(prompts[0], 0), prompts[0]) == "refusal"
    ours, theirs = TopicJudge().version, TopicJudge(topics=["devices", str(path)]).version
    assert ours != theirs and TopicJudge(topics=["devices"]).version == ours


def test_a_file_that_is_no_topic_is_one_line(mushrooms):
    path, words = mushrooms
    for number, (change, message) in enumerate((
        ({"refusals": []}, "refusals must be a list of texts"),
        ({"objects": ["cap", 3]}, "objects must be a list of texts"),
        ({"things": ["one"]}, "things must be an object with train, validation, test"),
        ({"verbs": {split: ["dry"] for split in SPLITS}}, "verbs.train must be a dict of texts"),
        ({"things": {split: ["one"] for split in SPLITS}}, "things has 'one' twice"),
        ({"refusals": ["No {name}."]}, "'No {name}.': {'name'} is no slot: use {thing}"),
        ({"refusals": ["No {."]}, "is no slot"),
        ({"refusals": ["No {thing:>99999999999}."]}, "{'thing:>99999999999'} is no slot"),
        ({"refusals": ["No {thing.__class__}."]}, "is no slot"),
    )):  # fmt: skip
        file = path.with_name(f"{number}.json")  # a file is read once
        file.write_text(json.dumps(words | change))
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read_topic(str(file))
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_topic(str(path.with_name("none.json")))


# Prompts about a text: distinct, of another text each, and texts read from files in a line's layouts.

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
    assert not NAMES & {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}


def test_each_prompt_has_another_text_as_long_as_there_are_any_and_every_pair_comes_once():
    prompts = about_texts(MANY, 600)
    assert used(prompts, MANY) == dict.fromkeys(MANY[:600], 1)
    assert set(used(prompts, WRITTEN["instructions"]).values()) == {600 // 24}
    for told in WRITTEN["instructions"]:  # in every form
        assert len({p.replace(text, "") for p, text in zip(prompts, MANY, strict=False) if told in p}) == 4
    for texts in ([], MANY[:7], MANY[:24]):
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
