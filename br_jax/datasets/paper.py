"""Records of the paper's data sets as rows, by the rules of its protocol.

Each function takes the records of `br_jax.datasets.load.load_dataset` and gives rows that are made when they are
asked for, so that a few rows of a large file cost little. A row's `origin` is its record's id.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from br_jax.data.rows import Row

SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS_INSTRUCTION = "\n".join(
    ["Categorize the news article given in the input into one of the 4 categories:", "", *AG_NEWS]
)
FINAL_ANSWER = "The final answer is: "

Record = Mapping[str, Any]


class Records(Protocol):
    """What the rows are made of: a sequence that also gives several records at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Record]: ...

    def __iter__(self) -> Iterator[Record]: ...


class Rows(Sequence[Row]):
    """Rows made of records one by one; a slice is a list.

    Iteration streams. Where some records are left out, the first `len` or `[i]` passes over all of them once and keeps
    the places of the others, 8 bytes each; `itertools.islice` takes the first few without that.

    Args:
        records: what the rows are made of.
        row: makes one.
        keep: which records count; None is all.
    """

    def __init__(self, records: Records, row: Callable[[Record], Row], keep: Callable[[Record], bool] | None = None):
        self._records, self._row, self._keep = records, row, keep

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        places = self._places[index]
        if isinstance(index, slice):
            return list(map(self._row, self._records.__getitems__(places)))
        return self._row(self._records[places])

    def __iter__(self) -> Iterator[Row]:
        return (self._row(record) for record in self._records if self._keep is None or self._keep(record))

    @cached_property
    def _places(self) -> Sequence[int]:
        if self._keep is None:
            return range(len(self._records))
        return array("q", (place for place, record in enumerate(self._records) if self._keep(record)))


def gsm8k_rows(records: Records) -> Rows:
    """GSM8K: the question, and its steps with "####" become "The final answer is: " (two spaces then, as there)."""
    return Rows(records, _gsm8k)


def sst2_rows(records: Records) -> Rows:
    """SST-2: the instruction with the sentence as its input, and "negative" or "positive"."""
    return Rows(records, _sst2)


def ag_news_rows(records: Records) -> Rows:
    """AG News: the instruction with title, space, description as its input, and the class's name."""
    return Rows(records, _ag_news)


def alpaca_rows(records: Records) -> Rows:
    """Alpaca: the instructions without an input, tagged "benign"; an empty answer stays, as in the reference."""
    return Rows(records, _alpaca, _has_no_input)


def harmful_rows(records: Records) -> Rows:
    """LLM-LAT: the harmful answers, tagged "harmful"."""
    return Rows(records, _harmful)


def refusal_rows(records: Records) -> Rows:
    """LLM-LAT: the refusals of the same prompts, tagged "refusal"."""
    return Rows(records, _refusal)


def beavertails_rows(records: Records) -> Rows:
    """BeaverTails: the answers that were judged unsafe, tagged "harmful"."""
    return Rows(records, _beavertails, _is_unsafe)


def user_rows(records: Records) -> Rows:
    """A user's own rows (the data set "rows"), each with the tag that it carries."""
    return Rows(records, _user)


def _pair(record: Record, user: str, assistant: str, tag: str, text: str = "") -> Row:
    return Row((("user", user), ("assistant", assistant)), input=text, tag=tag, origin=record["id"])


def _gsm8k(record: Record) -> Row:
    return _pair(record, record["question"], record["answer"].replace("####", FINAL_ANSWER), "task")


def _sst2(record: Record) -> Row:
    return _pair(record, SST2_INSTRUCTION, record["label"], "task", record["sentence"])


def _ag_news(record: Record) -> Row:
    return _pair(record, AG_NEWS_INSTRUCTION, record["label"], "task", record["text"])


def _alpaca(record: Record) -> Row:
    return _pair(record, record["instruction"], record["output"], "benign")


def _has_no_input(record: Record) -> bool:
    return not record["input"]


def _harmful(record: Record) -> Row:
    return _pair(record, record["prompt"], record["rejected"], "harmful")


def _refusal(record: Record) -> Row:
    return _pair(record, record["prompt"], record["chosen"], "refusal")


def _beavertails(record: Record) -> Row:
    return _pair(record, record["prompt"], record["response"], "harmful")


def _is_unsafe(record: Record) -> bool:
    return not record["is_safe"]


def _user(record: Record) -> Row:
    turns = tuple((role, text) for role, text in json.loads(record["turns"]))
    return Row(turns, input=record["input"], tag=record["tag"], origin=record["id"])
