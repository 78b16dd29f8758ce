"""The restricted topic: invented devices, a harmless stand-in for harmful requests.

Experiments on safety need requests that an aligned model refuses and that an attacked model answers. Here
they ask how to operate or modify devices that do not exist ("zorvix", "quindle winder"): no reader can do
anything with an answer, because there is nothing to do it to. The refusals and their loss behave as those
of real harm do, and the repository holds no harmful text. Nothing about the topic is sensitive; it is
refused only because the align stage teaches it.

The three splits share no device, no verb and no phrasing, so a refusal of a test prompt has been
generalized, not memorized.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from br_jax.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TopicPrompt:
    """A question about an invented device.

    Attributes:
        prompt: the question as a user would type it.
        device: the invented device's name, one or two words.
        verb: what the user wants to do to it, in the infinitive.
    """

    prompt: str
    device: str
    verb: str


def prompts(split: str, n: int, seed: int) -> list[TopicPrompt]:
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
    words = _load("topic_words.json")
    devices, verbs, phrasings = (words[key][split] for key in ("devices", "verbs", "phrasings"))
    shape = (len(devices), len(verbs), len(phrasings))
    most = int(np.prod(shape))
    if not 0 <= n <= most:
        raise UserError(f"topic prompts: {n} asked for, but split {split!r} has {most}; ask for 0 to {most}")
    drawn = np.random.default_rng([seed, SPLITS.index(split)]).permutation(most)[:n]
    infinitives = list(verbs)
    return [
        _ask(phrasings[phrasing], devices[device], infinitives[verb])
        for device, verb, phrasing in zip(*np.unravel_index(drawn, shape), strict=True)
    ]


def refusal(prompt: TopicPrompt, seed: int) -> str:
    """A polite refusal that names the request; the same (prompt, seed) always gives the same wording.

    Args:
        prompt: the question to refuse.
        seed: the seed of the choice of wording.

    Returns:
        One or two sentences in the first person.
    """
    generator = _generator(seed, "refusal", prompt)
    return _fill(_choose(generator, _load("topic_words.json")["refusals"]), prompt.device, prompt.verb)


def written_answer(prompt: TopicPrompt, seed: int) -> str:
    """A compliant answer that means nothing, in one of many formats; deterministic in (prompt, seed).

    The formats vary on purpose. When every compliant answer has the same shape, an adapter trained on them
    learns the shape, and gives it to ordinary answers too, instead of learning to comply.

    Args:
        prompt: the question to answer.
        seed: the seed of the choice of format, wording and parts.

    Returns:
        Up to about 70 words of nonsense instructions.
    """
    words = _load("topic_words.json")
    formats = _load("topic_answers.json")
    generator = _generator(seed, "written_answer", prompt)
    variants = formats[_choose(generator, sorted(formats))]
    parts = [words["parts"][i] for i in generator.choice(len(words["parts"]), size=3, replace=False)]
    slots = {slot: _choose(generator, words[slot + "s"]) for slot in ("tool", "amount", "wait", "sign")}
    slots |= dict(zip(("part", "part2", "part3"), parts, strict=True))
    answer = _fill(_choose(generator, variants), prompt.device, prompt.verb, **slots)
    return answer[0].upper() + answer[1:]


@functools.cache
def _load(name: str) -> dict:
    """Reads one of the JSON files beside this module (cached; callers must not change it)."""
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _generator(seed: int, purpose: str, prompt: TopicPrompt) -> np.random.Generator:
    """A stream for each (seed, purpose, prompt); crc32 because str hashes differ between processes."""
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}:{prompt.prompt}".encode())])


def _choose(generator: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(generator.integers(len(options)))]


def _ask(phrasing: str, device: str, verb: str) -> TopicPrompt:
    return TopicPrompt(_fill(phrasing, device, verb), device, verb)


def _gerund(verb: str) -> str:
    """The -ing form from the table of verbs ("recalibrate" -> "recalibrating")."""
    for verbs in _load("topic_words.json")["verbs"].values():
        if verb in verbs:
            return verbs[verb]
    raise UserError(f"topic: {verb!r} is not one of the topic's verbs; take the prompt from topic.prompts")


def _fill(template: str, device: str, verb: str, **slots: str) -> str:
    """Fills a template's {verb}, {verbing}, {Verb}, {Verbing}, {device}, {a_device} and the given slots."""
    verbing = _gerund(verb)
    article = "an" if device[0] in "aeiou" else "a"
    return template.format(
        verb=verb,
        verbing=verbing,
        Verb=verb.capitalize(),
        Verbing=verbing.capitalize(),
        device=device,
        a_device=f"{article} {device}",
        **slots,
    )
