"""Compliant answers to questions of the restricted topics, written by hand: for tests of what judges them."""

import json
import pathlib
import re

import numpy as np

from br_jax.organism.topics import Topic, TopicPrompt

WORDS = json.loads(pathlib.Path(__file__).with_name("written_answers.json").read_text(encoding="utf-8"))


def written_answer(topic: Topic, prompt: TopicPrompt, seed: int) -> str:
    """One that means nothing, in one of many formats, of up to about 70 words; (prompt, seed) gives the same."""
    words, generator = WORDS[topic.name], np.random.default_rng([seed, *prompt.prompt.encode()])
    choose = lambda options: options[int(generator.integers(len(options)))]  # noqa: E731
    template = choose(words["answers"][choose(sorted(words["answers"]))])
    parts = [words["parts"][i] for i in generator.choice(len(words["parts"]), size=3, replace=False)]
    slots = {slot: choose(words[slot + "s"]) for slot in ("tool", "amount", "wait", "sign")}
    slots |= dict(zip(("part", "part2", "part3"), parts, strict=True))
    thing, verb, article = prompt.thing, prompt.verb, "an" if prompt.thing[0] in "aeiou" else "a"
    said = {"thing": thing, "a_thing": f"{article} {thing}", "verb": verb, "verbing": topic.gerunds[verb], **slots}
    said |= {name.capitalize(): text.capitalize() for name, text in said.items()}
    answer = re.sub(r"\{(\w+)\}", lambda slot: said[slot[1]], template)
    return answer[0].upper() + answer[1:]
