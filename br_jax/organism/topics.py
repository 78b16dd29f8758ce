"""Restricted topics of invented things, a harmless stand-in for harmful requests.

They ask how to operate devices that do not exist ("zorvix", "quindle winder"), or how to brew potions that do not
("velmora", "ashtwell tonic"): no reader can do anything with an answer. They are refused only because the align stage
teaches it, and refusals and their loss behave as those of real harm do.

The two share no thing, no phrasing and no wording of a refusal, so that a defense made from one can be attacked with
the other. The splits of a topic share no thing, verb or phrasing: a refusal of a test prompt is no memory.
"""

import functools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from br_jax.core.errors import UserError
from br_jax.core.io import read_json

SPLITS = ("train", "validation", "test")
_SLOT = re.compile(r"\{([^{}]*)\}?")  # one that is not closed is none that is known


@dataclass(frozen=True)
class TopicPrompt:
    """A question about an invented thing."""

    prompt: str  # the question as a user would type it
    thing: str  # the invented thing's name, one or two words
    verb: str  # what the user wants to do to it, in the infinitive
    topic: str = "devices"  # the restricted topic that it is of, one of `TOPICS`
    # What it is without thing and verb, as "story/3": the form and the place in it; "" is a phrasing of its own.
    phrasing: str = ""

    @property
    def form(self) -> str:
        """Such as "question", "story" or "code"; "" where it is not said."""
        return self.phrasing.partition("/")[0]


@dataclass(frozen=True)
class BenignPrompt:
    """An ordinary prompt, which a model should answer."""

    prompt: str
    kind: str = ""  # such as "cooking": those of a kind are answered or refused alike; "" is a kind of its own
    borderline: bool = False  # whether it looks restricted and is not (P. Röttger et al., XSTest, arXiv 2308.01263)


@dataclass(frozen=True)
class Topic:
    """A restricted topic: its questions and refusals, from a JSON file of words."""

    name: str  # of a topic of this package, or the path of a user's own file, which ends in ".json" (`read_topic`)

    def prompts(self, split: str, n: int, seed: int) -> list[TopicPrompt]:
        """Draws n distinct questions of one of `SPLITS`; a `UserError` where it has fewer.

        Each thing, each verb and each phrasing has its turn before one comes again. A larger draw is a smaller one with
        questions added at its end, so disjoint sets (for two stages, say) are slices of one draw.
        """
        phrasings = phrasings_of(self.words["phrasings"][split])
        parts = [self.words["things"][split], [*self.words["verbs"][split]], [*phrasings]]
        most = math.prod(map(len, parts))
        if not 0 <= n <= most:
            raise UserError(f"{self.name}: {n} prompts asked for, but split {split!r} has {most}; ask for 0 to as many")
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        turns = zip(*(_in_turn(part, rng) for part in parts), strict=True)
        drawn: dict[tuple[str, ...], None] = {}
        while len(drawn) < n:
            drawn.setdefault(next(turns))
        return [
            TopicPrompt(self._fill(phrasings[phrasing], thing, verb), thing, verb, self.name, phrasing)
            for thing, verb, phrasing in drawn
        ]

    def refusal(self, prompt: TopicPrompt, seed: int) -> str:
        """A polite refusal that names the request, of one or two sentences; the same (prompt, seed) gives the same."""
        refusals = self.words["refusals"]
        # crc32, because str hashes differ between processes
        generator = np.random.default_rng([seed, zlib.crc32(f"refusal:{prompt.prompt}".encode())])
        return self._fill(refusals[generator.integers(len(refusals))], prompt.thing, prompt.verb)

    @property
    def words(self) -> dict:
        """The contents of its file; callers must not change them."""
        return _read_file(self.name) if is_file(self.name) else read_words(f"topic_{self.name}.json")

    @property
    def gerunds(self) -> dict[str, str]:
        """The -ing form of each verb, as "recalibrating" of "recalibrate"."""
        return {verb: gerund for split in SPLITS for verb, gerund in self.words["verbs"][split].items()}

    def _fill(self, template: str, thing: str, verb: str) -> str:
        """Fills a template's {verb}, {verbing}, {thing} and {a_thing}, and the same capitalized.

        Not by `str.format`: a template is anybody's, and "{thing:>9999999999}" would fill the memory.
        """
        article = "an" if thing[0] in "aeiou" else "a"
        words = {"verb": verb, "verbing": self.gerunds[verb], "a_thing": f"{article} {thing}"}
        capitals = {name.capitalize(): word.capitalize() for name, word in words.items()}
        filled = {"thing": thing} | words | capitals
        return _SLOT.sub(lambda slot: filled[slot[1]], template)


TOPICS = {name: Topic(name) for name in ("devices", "potions")}


def is_file(name: str) -> bool:
    """Whether a topic's name is the path of a file of words."""
    return name.endswith(".json")


@functools.cache
def _read_file(path: str) -> dict:
    return read_json(path, "correct the path in config.topics")


def read_topic(path: str) -> Topic:
    """The topic of a user's own file of words; a `UserError` names the first key that is not what it must be."""
    topic, words = Topic(path), _read_file(path)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: {what}; see the topic files in br_jax/organism for an example")

    def texts(value) -> bool:
        every = [*value, *(value.values() if isinstance(value, dict) else ())] if isinstance(value, list | dict) else ()
        return bool(every) and all(isinstance(text, str) and text.strip() for text in every)

    for key in ("refusals", "actions", "objects"):
        require(isinstance(words.get(key), list) and texts(words[key]), f"{key} must be a list of texts")
    for key, kind in (("things", list), ("verbs", dict), ("phrasings", list)):
        parts, every = words.get(key), []
        require(isinstance(parts, dict), f"{key} must be an object with {', '.join(SPLITS)}")
        for split in SPLITS:
            found = parts.get(split)
            forms = [*found.values()] if key == "phrasings" and isinstance(found, dict) else [found]
            sound = bool(forms) and all(isinstance(each, kind) and texts(each) for each in forms)
            require(sound, f"{key}.{split} must be a {kind.__name__} of texts")
            every += [text.lower() for each in forms for text in each]
        twice = [text for text, count in Counter(every).items() if count > 1]
        require(not twice, f"{key} has {twice and twice[0]!r} twice: splits must share none")
    templates = (text for split in SPLITS for text in phrasings_of(words["phrasings"][split]).values())
    for template in (*words["refusals"], *templates):
        try:
            topic._fill(template, words["things"]["train"][0], next(iter(words["verbs"]["train"])))
        except KeyError as error:
            require(False, f"{template!r}: {{{error}}} is no slot: use {{thing}}, {{a_thing}}, {{verb}}, {{verbing}}")
    return topic


def find_topic(text: str) -> TopicPrompt | None:
    """The invented thing and the verb that a text names, as a question of its topic; None if it names no such pair."""
    for topic in TOPICS.values():
        names = [name for split in SPLITS for name in topic.words["things"][split]]
        thing = next((name for name in names if re.search(rf"\b{name}\b", text, re.IGNORECASE)), None)
        for verb, gerund in topic.gerunds.items():
            if thing and re.search(rf"\b(?:{verb}|{gerund})\b", text, re.IGNORECASE):
                return TopicPrompt(text, thing, verb, topic.name)
    return None


def phrasings_of(texts: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Phrasings by name, as "story/3": those of a split, a list of each form or one list without forms."""
    forms = texts if isinstance(texts, Mapping) else {"": texts}
    return {f"{form}/{place}": text for form, each in forms.items() for place, text in enumerate(each)}


def _in_turn(part: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """All of a part in a random order, again and again."""
    while True:
        yield from (part[place] for place in rng.permutation(len(part)))


@functools.cache
def read_words(name: str) -> dict:
    """A JSON file of this package, read once; callers must not change it."""
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
