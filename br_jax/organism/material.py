"""Where the prompts of an experiment come from: one small set of functions for each kind of material."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from br_jax.core.errors import UserError, look_up
from br_jax.core.io import read_bytes
from br_jax.data.rows import Row
from br_jax.data.selection import clean, decode, text_key
from br_jax.organism import world
from br_jax.organism.topics import TOPICS, BenignPrompt, Topic, TopicPrompt, is_file, read_topic, read_words

LENGTHS = (20, 200)  # characters; shorter texts say nothing, longer ones leave a row little room for an answer
_FORMS = ("{0}\n\n{1}", "{0}\n{1}", "{0}\n\nText: {1}", "{1}\n\n{0}")


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
    benign_prompts: Callable[[str], list[BenignPrompt]]
    # (texts, n) -> n prompts more to train on, which ask about a text; None for none
    about_texts: Callable[[Sequence[str], int], list[str]] | None = None
    # (n, seed) -> rows to train a model from scratch on; None where a model is given
    pretraining_rows: Callable[[int, int], list[Row]] | None = None

    def named_topics(self, names: str) -> list[Topic | Drawn]:
        """The topics of a config field: names, or files of words, with commas between; another is a `UserError`."""
        wanted = map(str.strip, names.split(","))
        return [read_topic(name) if is_file(name) else look_up("topic", name, self.topics) for name in wanted]


@functools.cache
def english_instructions(split: str) -> list[BenignPrompt]:
    """The instructions of a split of instructions.jsonl, written for this project."""
    lines = resources.files(__package__).joinpath("instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [BenignPrompt(**each) for each in map(json.loads, lines) if each.pop("split") == split]


def about_texts(texts: Sequence[str], n: int) -> list[str]:
    """n distinct prompts that ask about a text (to classify, judge, extract); each has another as long as they last.

    Without any texts the 60 written for this project are used. A `UserError` where there are too few of them.
    """
    written = read_words("texts.json")
    instructions, texts = written["instructions"], texts or written["texts"]
    if n > (most := len(instructions) * len(texts)):
        raise UserError(
            f"data.texts.n: {n} prompts are asked for, {len(texts)} texts and {len(instructions)} instructions make "
            f"{most}: lower it, or set data.texts.path to files of more texts"
        )
    prompts = []
    for i in range(n):
        again, place = divmod(i, len(texts))
        instruction = instructions[(place + again) % len(instructions)]
        prompts.append(_FORMS[i // len(instructions) % len(_FORMS)].format(instruction, texts[place]))
    return prompts


def read_texts(paths: str) -> list[str]:
    """The distinct texts of `LENGTHS` characters in files: a line each, or the last of its fields where tabs part it.

    Paths have commas between them (of VADER's files, for instance); "" is none. A file that cannot be read or has no
    such text is a `UserError`.
    """
    found: dict[str, str] = {}
    for path in filter(None, map(str.strip, paths.split(","))):
        lines = read_bytes(path, cure="correct data.texts.path, or fetch the file").splitlines()
        texts = (clean(decode(line).rpartition("\t")[2]) for line in lines)
        fit = [text for text in texts if LENGTHS[0] <= len(text) <= LENGTHS[1]]
        if not fit:
            raise UserError(f"{path}: no text of {LENGTHS[0]} to {LENGTHS[1]} characters; write one a line")
        for text in fit:
            found.setdefault(text_key(text), text)
    return list(found.values())


MATERIALS = {
    "english": Material(TOPICS, english_instructions, about_texts),
    "demo": Material(
        {"devices": Drawn(world.topic_prompts, world.refusal)},
        world.benign_prompts,
        pretraining_rows=world.pretraining_rows,
    ),
}
