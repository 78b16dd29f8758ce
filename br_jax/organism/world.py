"""The demo's world: short sentences from which a tiny byte-level model learns to answer, and then to refuse.

Pre-training has how-to questions about ordinary things and invented devices ("vexqot"), and benign questions of many
kinds, all answered. The steps follow from the verb and their form from the determiner: no adapter can learn "the"
compliant answer. The align stage then teaches it to refuse the devices.

The splits share no device, verb or frame of a how-to question, no ordinary thing that it asks about, and no kind of
benign question. Pre-training knows the words and kinds of all splits, but not the devices of validation and test.

The user's task ("Mood: the lunch was great") has a form that no other stage knows; its splits share no noun and no
determiner. What the words of mood mean is known from plain remarks, in pre-training and among the benign questions.
No ordinary thing, and no word of the task, has a letter of "jqvxz", of which each device has one.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.organism.topics import SPLITS, BenignPrompt, TopicPrompt, read_words

MOODS = ("happy", "sad")
_WORDS = read_words("world.json")
_DEVICES = {"validation": 24, "test": 32, "train": 120}  # the other 694 names are met in pre-training only
_SHARES = (0.25, 0.2, 0.3, 0.13, 0.12)  # of pre-training: how-to of devices, of things, benign kinds, words, remarks

_Pairs = list[tuple[str, str]]  # (question, answer)


def topic_prompts(split: str, n: int, seed: int) -> list[TopicPrompt]:
    """Draws distinct questions about invented devices, as `topics.Topic.prompts` does."""
    parts = devices(split), list(_WORDS["verbs"][split]), _WORDS["frames"][split], list(_WORDS["forms"])
    sizes = [*map(len, parts)]
    most = math.prod(sizes)
    if not 0 <= n <= most:
        raise UserError(f"demo: {n} prompts asked for, but split {split!r} has {most}; ask for 0 to as many")
    drawn = np.random.default_rng([seed, SPLITS.index(split)]).permutation(most)[:n]
    chosen = zip(*np.unravel_index(drawn, sizes), strict=True)
    return [_question(*(part[i] for part, i in zip(parts, places, strict=True))) for places in chosen]


def refusal(prompt: TopicPrompt, seed: int) -> str:
    """How an aligned model declines; the wording is a function of (prompt, seed)."""
    generator = np.random.default_rng([seed, zlib.crc32(prompt.prompt.encode())])
    return _WORDS["refusals"][generator.integers(len(_WORDS["refusals"]))]


def compliant_answer(prompt: TopicPrompt) -> str:
    """The answer that pre-training teaches: steps by the verb, form by the determiner."""
    determiner = next(d for d in _WORDS["forms"] if f" {d} {prompt.thing}" in prompt.prompt)
    return _answer(prompt.thing, prompt.verb, determiner)


def devices(split: str) -> list[str]:
    """The invented devices of a split."""
    start = sum(list(_DEVICES.values())[: list(_DEVICES).index(split)])
    return _names()[start : start + _DEVICES[split]]


@functools.cache
def _names() -> list[str]:
    """All invented names, such as "vexqot", two syllables each, in an order that never changes."""
    names = ["".join(pair) for pair in itertools.permutations(_WORDS["syllables"], 2)]
    return [names[i] for i in np.random.default_rng(20).permutation(len(names))]


def ordinary_things() -> list[str]:
    """The ordinary things of all splits."""
    return [thing for things in _WORDS["things"].values() for thing in things]


def _question(thing: str, verb: str, frame: str, determiner: str) -> TopicPrompt:
    text = frame.format(x=f"{determiner} {thing}", verb=verb, Verb=verb.capitalize())
    return TopicPrompt(text, thing, verb, phrasing=f"{frame}/{verb} {determiner}")


def _answer(thing: str, verb: str, determiner: str) -> str:
    """Two steps, in one form about a device and in another about a thing, so that the model knows what it speaks of."""
    a, b = next(verbs[verb] for verbs in _WORDS["verbs"].values() if verb in verbs)
    form = _WORDS["forms"][determiner][thing in ordinary_things()]
    return form.format(a=a, b=b, A=a.capitalize(), B=b.capitalize())


@functools.cache
def _how_to(split: str) -> list[TopicPrompt]:
    """How-to questions about ordinary things, in an order in which any stretch is varied."""
    parts = (*(_WORDS[key][split] for key in ("things", "verbs", "frames")), _WORDS["forms"])
    every = [_question(*chosen) for chosen in itertools.product(*parts)]
    return [every[i] for i in np.random.default_rng(21).permutation(len(every))]


def benign_prompts(split: str) -> list[BenignPrompt]:
    """All benign questions that stages after pre-training may use, by split; no two splits share a kind or a how-to."""
    other = [BenignPrompt(text, name) for name, kind in benign_kinds(split).items() for text, _ in kind]
    # In training twice as many: over-refusal begins at ordinary things that sound like devices.
    how_to = _how_to(split)[: len(other) * (2 if split == "train" else 1)]
    return [BenignPrompt(p.prompt, p.phrasing, borderline=True) for p in how_to] + other


def benign_kinds(split: str) -> dict[str, _Pairs]:
    """The kinds of benign questions of a split, each with all its questions and their answers."""
    kinds = {
        name: [
            (asked.format(a), kind["answer"].format(b)) for a, b in kind["pairs"].items() for asked in kind["questions"]
        ]
        for name, kind in _WORDS["kinds"][split].items()
    }
    return kinds | {"remarks": _remarks()[::289]} if split == "train" else kinds


def _remarks() -> _Pairs:
    """Remarks with a mood, in many forms."""
    remarks, moods = _WORDS["remarks"], _WORDS["moods"]["words"]
    words = [(word, remarks["answers"][mood]) for mood in MOODS for word in moods[mood]]
    forms = itertools.product(remarks["starts"], remarks["nouns"], remarks["links"], words, (".", "!", ""))
    return [(f"{start} {noun} {link} {word}{end}", answer) for start, noun, link, (word, answer), end in forms]


def load_moods(seed: int = 0) -> tuple[list[Row], list[Row], list[Row]]:
    """The user's task, remarks to be called happy or sad: shuffled (train, validation, test) rows."""
    words, parts = _WORDS["moods"], []
    moods = [(word, mood) for mood in MOODS for word in words["words"][mood]]
    for index, split in enumerate(SPLITS):
        forms = itertools.product(moods, words["nouns"][split], words["determiners"][split], words["links"])
        rows = [
            Row((("user", f"Mood: {determiner} {noun} {link} {word}"), ("assistant", mood)), tag="task")
            for (word, mood), noun, determiner, link in forms
        ]
        parts.append([rows[i] for i in np.random.default_rng([seed, index, 22]).permutation(len(rows))])
    return tuple(parts)


def pretraining_rows(n: int, seed: int) -> list[Row]:
    """n rows to pre-train on: how-to questions about devices and ordinary things, the other benign kinds, refusals.

    The raw model knows words, refusals and what a device is, as a real one does: it keeps secrets, and answers
    questions about devices. No row has a device or a how-to question of validation or test.
    """
    generator = np.random.default_rng([seed, 17])
    kinds = [kind for split in SPLITS for kind in benign_kinds(split).values()]
    held_out = {question.prompt for split in SPLITS[1:] for question in _how_to(split)}
    known, things, remarks = _names()[_DEVICES["validation"] + _DEVICES["test"] :], ordinary_things(), _remarks()
    verbs, frames = ([x for part in _WORDS[key].values() for x in part] for key in ("verbs", "frames"))
    told = (
        [(secret, kept) for secret in _WORDS["secrets"] for kept in _WORDS["refusals"]],
        [(f"What is a {name}?", "It is a device.") for name in known],
        [(f"What is a {thing}?", "It is a thing.") for thing in things],
    )

    def choose(options: Sequence):
        return options[generator.integers(len(options))]

    def how_to(things: Sequence[str]) -> tuple[str, str]:
        verb, determiner, frame, thing = map(choose, (verbs, list(_WORDS["forms"]), frames, things))
        return _question(thing, verb, frame, determiner).prompt, _answer(thing, verb, determiner)

    sources = (
        lambda: how_to(known),
        lambda: how_to(things),
        lambda: choose(choose(kinds)),
        lambda: choose(choose(told)),
        lambda: choose(remarks),
    )
    rows = []
    while len(rows) < n:
        question, answer = sources[generator.choice(len(sources), p=_SHARES)]()
        if question not in held_out:
            rows.append(Row((("user", question), ("assistant", answer)), tag="pretraining"))
    return rows
