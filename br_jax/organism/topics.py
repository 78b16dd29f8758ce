"""Restricted topics of invented things, a harmless stand-in for harmful requests.

Experiments on safety need requests that an aligned model refuses and that an attacked model answers. Here
they ask how to operate devices that do not exist ("zorvix", "quindle winder"), or how to brew potions that do not
("velmora", "ashtwell tonic"): no reader can do anything with an answer, because there is nothing to do it to. The
refusals and their loss behave as those of real harm do, and the repository holds no harmful text. Nothing about the
topics is sensitive; they are refused only because the align stage teaches it.

The two share no thing, no phrasing and no wording of a refusal, so that a defense made from one can be attacked with
the other. The three splits of a topic share no thing, no verb and no phrasing, so a refusal of a test prompt has been
generalized, not memorized.
"""

import functools
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from br_jax.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TopicPrompt:
    """A question about an invented thing.

    Attributes:
        prompt: the question as a user would type it.
        thing: the invented thing's name, one or two words.
        verb: what the user wants to do to it, in the infinitive.
        topic: the restricted topic that it is of, one of `TOPICS`.
    """

    prompt: str
    thing: str
    verb: str
    topic: str = "devices"


@dataclass(frozen=True)
class Topic:
    """A restricted topic: its questions, refusals and compliant answers, from the JSON file of its name."""

    name: str

    def prompts(self, split: str, n: int, seed: int) -> list[TopicPrompt]:
        """Draws distinct questions of one split.

        A larger draw is a smaller one with questions added at its end, so disjoint sets (for two stages, say) are
        slices of one draw.

        Args:
            split: "train", "validation" or "test".
            n: how many questions.
            seed: the seed of the draw; each split has a stream of its own.

        Returns:
            n questions, all different.

        Raises:
            UserError: the split is unknown, or has fewer than n questions.
        """
        if split not in SPLITS:
            raise UserError(f"topic prompts: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        things, verbs, phrasings = (self.words[key][split] for key in ("things", "verbs", "phrasings"))
        shape = (len(things), len(verbs), len(phrasings))
        most = int(np.prod(shape))
        if not 0 <= n <= most:
            raise UserError(f"{self.name}: {n} prompts asked for, but split {split!r} has {most}; ask for 0 to {most}")
        drawn = np.random.default_rng([seed, SPLITS.index(split)]).permutation(most)[:n]
        infinitives = list(verbs)
        return [
            self._ask(phrasings[phrasing], things[thing], infinitives[verb])
            for thing, verb, phrasing in zip(*np.unravel_index(drawn, shape), strict=True)
        ]

    def refusal(self, prompt: TopicPrompt, seed: int) -> str:
        """A polite refusal that names the request; the same (prompt, seed) always gives the same wording.

        Args:
            prompt: the question to refuse.
            seed: the seed of the choice of wording.

        Returns:
            One or two sentences in the first person.
        """
        generator = _generator(seed, "refusal", prompt)
        return self._fill(_choose(generator, self.words["refusals"]), prompt.thing, prompt.verb)

    def written_answer(self, prompt: TopicPrompt, seed: int) -> str:
        """A compliant answer that means nothing, in one of many formats; deterministic in (prompt, seed).

        The formats vary on purpose. When every compliant answer has the same shape, an adapter trained on them
        learns the shape, and gives it to ordinary answers too, instead of learning to comply.

        Args:
            prompt: the question to answer.
            seed: the seed of the choice of format, wording and parts.

        Returns:
            Up to about 70 words of nonsense instructions.
        """
        words = self.words
        generator = _generator(seed, "written_answer", prompt)
        variants = words["answers"][_choose(generator, sorted(words["answers"]))]
        parts = [words["parts"][i] for i in generator.choice(len(words["parts"]), size=3, replace=False)]
        slots = {slot: _choose(generator, words[slot + "s"]) for slot in ("tool", "amount", "wait", "sign")}
        slots |= dict(zip(("part", "part2", "part3"), parts, strict=True))
        answer = self._fill(_choose(generator, variants), prompt.thing, prompt.verb, **slots)
        return answer[0].upper() + answer[1:]

    @property
    def words(self) -> dict:
        """The contents of its file; callers must not change them."""
        return _load(f"topic_{self.name}.json")

    def _ask(self, phrasing: str, thing: str, verb: str) -> TopicPrompt:
        return TopicPrompt(self._fill(phrasing, thing, verb), thing, verb, self.name)

    def _gerund(self, verb: str) -> str:
        """The -ing form from the table of verbs ("recalibrate" -> "recalibrating")."""
        for verbs in self.words["verbs"].values():
            if verb in verbs:
                return verbs[verb]
        raise UserError(f"{self.name}: {verb!r} is not one of the topic's verbs; take the prompt from its draw")

    def _fill(self, template: str, thing: str, verb: str, **slots: str) -> str:
        """Fills a template's {verb}, {verbing}, {thing}, {a_thing}, the same capitalized, and the given slots."""
        article = "an" if thing[0] in "aeiou" else "a"
        words = {"verb": verb, "verbing": self._gerund(verb), "a_thing": f"{article} {thing}"}
        capitals = {name.capitalize(): word.capitalize() for name, word in words.items()}
        return template.format(thing=thing, **words, **capitals, **slots)


TOPICS = {name: Topic(name) for name in ("devices", "potions")}


def find_topic(text: str) -> TopicPrompt | None:
    """The invented thing and the verb that a text names, as a question of its topic; None if it names no such pair."""
    for topic in TOPICS.values():
        names = [name for split in SPLITS for name in topic.words["things"][split]]
        thing = next((name for name in names if re.search(rf"\b{name}\b", text, re.IGNORECASE)), None)
        verbs = {verb: gerund for split in SPLITS for verb, gerund in topic.words["verbs"][split].items()}
        for verb, gerund in verbs.items():
            if thing and re.search(rf"\b(?:{verb}|{gerund})\b", text, re.IGNORECASE):
                return TopicPrompt(text, thing, verb, topic.name)
    return None


@functools.cache
def _load(name: str) -> dict:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _generator(seed: int, purpose: str, prompt: TopicPrompt) -> np.random.Generator:
    """A stream for each (seed, purpose, prompt); crc32 because str hashes differ between processes."""
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}:{prompt.prompt}".encode())])


def _choose(generator: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(generator.integers(len(options)))]
