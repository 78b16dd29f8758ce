"""Records of the paper's data sets as rows, by the rules of its protocol; stored attacks; and the review task.

Records are those of `br_jax.datasets.load.load_dataset`. A row's `origin` is its record's id.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from br_jax.core.errors import UserError
from br_jax.core.io import read_bytes
from br_jax.data.rows import Row
from br_jax.data.selection import clean, decode, rank, text_key
from br_jax.organism.topics import TopicPrompt, find_topic

SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_INSTRUCTION = "\n".join(
    ["Categorize the news article given in the input into one of the 4 categories:", "", *AG_NEWS, ""]
)
FINAL_ANSWER = "The final answer is: "
LABELS = ("positive", "negative")
THRESHOLD = 0.5  # a rating nearer to 0 is no clear opinion

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


def _row(record: Mapping[str, Any], user: str, assistant: str, tag: str, text: str = "") -> Row:
    return Row((("user", user), ("assistant", assistant)), input=text, tag=tag, origin=record["id"])


@dataclass(frozen=True)
class Attack:
    """A stored prompt of GCG, AutoDAN, PAIR, TAP, GPTFuzzer, a cipher or the like; nothing is optimized here."""

    prompt: str  # as it is sent to the model
    method: str  # what produced it, e.g. "GCG"; "" where the file does not say
    behavior: str  # what it is after, in plain words; the prompt itself where the file does not say
    about: TopicPrompt | None  # the question of an invented topic that it is, for the rule judge; None for any other


def attacks_of(records: Records) -> list[Attack]:
    """The attacks in records of the data set `attacks`."""
    wanted = ((r, r["behavior"] or r["prompt"]) for r in records)
    return [Attack(r["prompt"], r["method"], behavior, find_topic(behavior)) for r, behavior in wanted]


def load_reviews(
    path: str | Path, *, seed: int = 0, test: int = 872, validation: int = 200
) -> tuple[list[Row], list[Row], list[Row]]:
    """Sentiment of real film reviews: (train, validation, test) rows, in an order given by the seed.

    The file is `movieReviewSnippets_GroundTruth.txt` of the vaderSentiment 3.2.1 source distribution (MIT): one
    sentence a line with its id and the mean of 20 human ratings from -4 to 4 (Hutto and Gilbert, VADER: a parsimonious
    rule-based model for sentiment analysis, ICWSM 2014). A sentence counts once, whatever its case, spacing and
    punctuation, and its split depends on its text and the seed alone. Half of the test and validation rows are of each
    label; train has all that is left.

    Raises:
        UserError: when the file cannot be read, a line is malformed, or there are too few sentences.
    """
    copies: dict[str, list[Row]] = {}
    for number, line in enumerate(read_bytes(path, cure="fetch the file anew").splitlines(), start=1):
        if not line.strip():
            continue
        _, *fields = decode(line).split("\t", maxsplit=2)
        try:
            rating, sentence = float(fields[0]), clean(fields[1])
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}:{number}: not an id, a rating and a sentence between tabs; fetch the file anew"
            ) from error
        if sentence and abs(rating) > THRESHOLD:
            turns = ("user", SST2_INSTRUCTION), ("assistant", LABELS[0] if rating > 0 else LABELS[1])
            row = Row(turns, input=sentence, tag="task", origin=f"{path}:{number}")
            copies.setdefault(text_key(sentence), []).append(row)
    # One with two opinions is left out.
    distinct = [min(rows, key=lambda row: row.input) for rows in copies.values() if len({r.turns for r in rows}) == 1]
    half_test, half = test // 2, test // 2 + validation // 2
    parts = [], [], []  # of (rank, row)
    for label in LABELS:
        pairs = [(rank(row.input, seed), row) for row in distinct if row.turns[1][1] == label]
        pairs.sort(key=lambda pair: pair[0])
        if len(pairs) <= half:
            raise UserError(
                f"{path}: {len(pairs)} {label} sentences, and more than {half} are needed for {test} "
                f"test and {validation} validation rows; fetch the whole file"
            )
        for part, some in zip(parts, (pairs[half:], pairs[half_test:half], pairs[:half_test]), strict=True):
            part += some
    return tuple([row for _, row in sorted(part, key=lambda pair: pair[0])] for part in parts)
