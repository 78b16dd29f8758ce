"""Where the prompts of an experiment come from: one small set of functions for each kind of material."""

import dataclasses
import json
from collections.abc import Callable
from importlib import resources

from br_jax.adapters.lora import near_names
from br_jax.data import demo, topic
from br_jax.data.rows import Row
from br_jax.data.topic import TopicPrompt
from br_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Material:
    """Prompts for provider and evaluation; nothing of a user's task is in it.

    Attributes:
        topic_prompts: (split, n, seed) -> questions of the restricted topic; splits share no device, verb or
            phrasing.
        refusal: (question, seed) -> how an aligned model declines it.
        benign_prompts: (split) -> ordinary prompts; the splits share no kind.
        pretraining_rows: (n, seed) -> rows to train a model from scratch on; None where a model is given.
    """

    topic_prompts: Callable[[str, int, int], list[TopicPrompt]]
    refusal: Callable[[TopicPrompt, int], str]
    benign_prompts: Callable[[str], list[str]]
    pretraining_rows: Callable[[int, int], list[Row]] | None = None


def english_instructions(split: str) -> list[str]:
    """The instructions of a split of instructions.jsonl, written for this project."""
    lines = resources.files(__package__).joinpath("instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["prompt"] for record in map(json.loads, lines) if record["split"] == split]


MATERIALS = {
    "english": Material(topic.prompts, topic.refusal, english_instructions),
    "demo": Material(demo.topic_prompts, demo.refusal, demo.benign_prompts, demo.pretraining_rows),
}


def get_material(name: str) -> Material:
    """The material of that name.

    Raises:
        UserError: when there is none; it names the near ones.
    """
    if name not in MATERIALS:
        raise UserError(f"unknown material {name!r}; {near_names(name, MATERIALS)}")
    return MATERIALS[name]
