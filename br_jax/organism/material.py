"""Where the prompts of an experiment come from: one small set of functions for each kind of material."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from br_jax.core.errors import look_up
from br_jax.data.rows import Row
from br_jax.organism import world
from br_jax.organism.texts import about_texts
from br_jax.organism.topics import TOPICS, Topic, TopicPrompt, is_file, read_topic


class Drawn(NamedTuple):
    """A topic made of two functions, with the signatures of `Topic`'s methods."""

    prompts: Callable[[str, int, int], list[TopicPrompt]]
    refusal: Callable[[TopicPrompt, int], str]


@dataclasses.dataclass(frozen=True)
class Material:
    """Prompts for provider and evaluation; nothing of a user's task is in it."""

    # By name: their questions, and how an aligned model declines them; splits share no thing, verb or phrasing.
    topics: Mapping[str, Topic | Drawn]
    # (split) -> ordinary prompts; the splits share no kind
    benign_prompts: Callable[[str], list[str]]
    # (texts, n) -> n prompts more to train on, which ask about a text; None for none
    about_texts: Callable[[Sequence[str], int], list[str]] | None = None
    # (n, seed) -> rows to train a model from scratch on; None where a model is given
    pretraining_rows: Callable[[int, int], list[Row]] | None = None

    def named_topics(self, names: str) -> list[Topic | Drawn]:
        """The topics of a config field: names, or files of words, with commas between; another is a `UserError`."""
        wanted = map(str.strip, names.split(","))
        return [read_topic(name) if is_file(name) else look_up("topic", name, self.topics) for name in wanted]


@functools.cache
def english_instructions(split: str) -> list[str]:
    """The instructions of a split of instructions.jsonl, written for this project."""
    lines = resources.files(__package__).joinpath("instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["prompt"] for record in map(json.loads, lines) if record["split"] == split]


MATERIALS = {
    "english": Material(TOPICS, english_instructions, about_texts),
    "demo": Material(
        {"devices": Drawn(world.topic_prompts, world.refusal)},
        world.benign_prompts,
        pretraining_rows=world.pretraining_rows,
    ),
}
