"""Records of the paper's data sets as rows, by the rules of its protocol; stored attacks; and the review task.

Records are those of `br_jax.datasets.load.load_dataset`. A row's `origin` is its record's id.
"""

from collections.abc import Callable, Iterable, Mapping
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


def _rows(tag: str, turns: Callable[[Mapping], tuple[str, ...]], keep: Callable[[Mapping], bool] = bool):
    """A function that makes a row of each record to keep: of user's turn, answer and, if there is one, input."""

    def rows(records: Records) -> list[Row]:
        made = ((r["id"], *turns(r)) for r in records if keep(r))
        return [Row((("user", u), ("assistant", a)), "".join(more), tag, origin) for origin, u, a, *more in made]

    return rows


# The question, and its steps with "####" become "The final answer is: " (two spaces then, as there).
gsm8k_rows = _rows("task", lambda r: (r["question"], r["answer"].replace("####", FINAL_ANSWER)))
sst2_rows = _rows("task", lambda r: (SST2_INSTRUCTION, r["label"], r["sentence"]))
# The input is title, space, description.
ag_news_rows = _rows("task", lambda r: (AG_NEWS_INSTRUCTION, r["label"], r["text"]))
# Instructions without an input; an empty answer stays, as in the reference.
alpaca_rows = _rows("benign", lambda r: (r["instruction"], r["output"]), lambda r: not r["input"])
# LLM-LAT's harmful answers, and its refusals of the same prompts.
harmful_rows = _rows("harmful", lambda r: (r["prompt"], r["rejected"]))
refusal_rows = _rows("refusal", lambda r: (r["prompt"], r["chosen"]))
# Answers that were judged unsafe.
beavertails_rows = _rows("harmful", lambda r: (r["prompt"], r["response"]), lambda r: not r["is_safe"])


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

    The file is `movieReviewSnippets_GroundTruth.txt` of the vaderSentiment 3.2.1 source distribution (MIT; Hutto and
    Gilbert, ICWSM 2014): one sentence a line with its id and the mean of 20 human ratings from -4 to 4. A sentence
    counts once, whatever its case, spacing and punctuation, and its split depends on its text and the seed alone. Half
    of the test and validation rows are of each label; train has all that is left.
    """
    copies: dict[str, list[Row]] = {}
    for number, line in enumerate(read_bytes(path, cure="fetch the file anew").splitlines(), start=1):
        if not line.strip():
            continue
        _, *fields = decode(line).split("\t", maxsplit=2)
        try:
            rating, sentence = float(fields[0]), clean(fields[1])
        except (ValueError, IndexError) as error:
            wrong = "not an id, a rating and a sentence between tabs; fetch the file anew"
            raise UserError(f"{path}:{number}: {wrong}") from error
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
