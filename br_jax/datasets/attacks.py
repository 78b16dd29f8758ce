"""Attack prompts to replay: stored texts of GCG, AutoDAN, PAIR, TAP, GPTFuzzer, ciphers and the like.

Nothing is optimized here: an attack is a prompt that somebody found elsewhere, with what it is after.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from br_jax.organism.topics import TopicPrompt, find_topic


@dataclass(frozen=True)
class Attack:
    """One stored prompt."""

    prompt: str  # as it is sent to the model
    method: str  # who found it, e.g. "GCG"; "" where the file does not say
    behavior: str  # what it is after, in plain words; the prompt itself where the file does not say
    about: TopicPrompt | None  # the question of an invented topic that it is, for the rule judge; None for any other


def attacks_of(records: Iterable[Mapping[str, str]]) -> list[Attack]:
    """The attacks in records of the data set `attacks` (see `builders.Attacks` for its layouts)."""
    return [
        Attack(r["prompt"], r["method"], r["behavior"] or r["prompt"], find_topic(r["behavior"] or r["prompt"]))
        for r in records
    ]
