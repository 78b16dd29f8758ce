"""Compliant answers to questions of the restricted topics, written by hand: for tests of what judges them."""

import json
import pathlib
import re
import zlib

import numpy as np

from br_jax.organism.topics import Topic, TopicPrompt

WORDS = json.loads(pathlib.Path(__file__).with_name("written_answers.json").read_text(encoding="utf-8"))


def written_answer(topic: Topic, prompt: TopicPrompt, seed: int) -> str:
    """One that means nothing, in one of many formats, of up to about 70 words; (prompt, seed) gives the same."""
    words = WORDS[topic.name]
    generator = np.random.default_rng([seed, zlib.crc32(f"written_answer:{prompt.prompt}".encode())])
    choose = lambda options: options[int(generator.integers(len(options)))]  # noqa: E731
    variants = words["answers"][choose(sorted(words["answers"]))]
    parts = [words["parts"][i] for i in generator.choice(len(words["parts"]), size=3, replace=False)]
    slots = {slot: choose(words[slot + "s"]) for slot in ("tool", "amount", "wait", "sign")}
    slots |= dict(zip(("part", "part2", "part3"), parts, strict=True))
    template = re.sub(r"\{(\w+)\}", lambda slot: slots.get(slot[1], slot[0]), choose(variants))
    answer = topic._fill(template, prompt.thing, prompt.verb)
    return answer[0].upper() + answer[1:]
