"""Records of the paper's data sets as rows, by the rules of its protocol; and stored attacks, to be replayed.

Each function takes the records of `br_jax.datasets.load.load_dataset`. A row's `origin` is its record's id.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from br_jax.data.rows import Row
from br_jax.organism.topics import TopicPrompt, find_topic

SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_INSTRUCTION = "\n".join(
    ["Categorize the news article given in the input into one of the 4 categories:", "", *AG_NEWS, ""]
)
FINAL_ANSWER = "The final answer is: "

Records = Iterable[Mapping[str, Any]]


def gsm8k_rows(records: Records) -> list[Row]:
    """GSM8K: the question, and its steps with "####" become "The final answer is: " (two spaces then, as there)."""
    return [_row(r, r["question"], r["answer"].replace("####", FINAL_ANSWER), "task") for r in records]


def sst2_rows(records: Records) -> list[Row]:
    """SST-2: the instruction with the sentence as its input, and "negative" or "positive"."""
    return [_row(r, SST2_INSTRUCTION, r["label"], "task", r["sentence"]) for r in records]


def ag_news_rows(records: Records) -> list[Row]:
    """AG News: the instruction with title, space, description as its input, and the class's name."""
    return [_row(r, AG_NEWS_INSTRUCTION, r["label"], "task", r["text"]) for r in records]


def alpaca_rows(records: Records) -> list[Row]:
    """Alpaca: the instructions without an input, tagged "benign"; an empty answer stays, as in the reference."""
    return [_row(r, r["instruction"], r["output"], "benign") for r in records if not r["input"]]


def harmful_rows(records: Records) -> list[Row]:
    """LLM-LAT: the harmful answers, tagged "harmful"."""
    return [_row(r, r["prompt"], r["rejected"], "harmful") for r in records]


def refusal_rows(records: Records) -> list[Row]:
    """LLM-LAT: the refusals of the same prompts, tagged "refusal"."""
    return [_row(r, r["prompt"], r["chosen"], "refusal") for r in records]


def beavertails_rows(records: Records) -> list[Row]:
    """BeaverTails: the answers that were judged unsafe, tagged "harmful"."""
    return [_row(r, r["prompt"], r["response"], "harmful") for r in records if not r["is_safe"]]


@dataclass(frozen=True)
class Attack:
    """A stored prompt of GCG, AutoDAN, PAIR, TAP, GPTFuzzer, a cipher or the like; nothing is optimized here."""

    prompt: str  # as it is sent to the model
    method: str  # what produced it, e.g. "GCG"; "" where the file does not say
    behavior: str  # what it is after, in plain words; the prompt itself where the file does not say
    about: TopicPrompt | None  # the question of an invented topic that it is, for the rule judge; None for any other


def attacks_of(records: Records) -> list[Attack]:
    """The attacks in records of the data set `attacks` (see `builders.Attacks` for its layouts)."""
    wanted = ((r, r["behavior"] or r["prompt"]) for r in records)
    return [Attack(r["prompt"], r["method"], behavior, find_topic(behavior)) for r, behavior in wanted]


def _row(record: Mapping[str, Any], user: str, assistant: str, tag: str, text: str = "") -> Row:
    return Row((("user", user), ("assistant", assistant)), input=text, tag=tag, origin=record["id"])
