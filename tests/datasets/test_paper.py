"""The paper's rules, on records by hand."""

import pickle

import pytest

from br_jax.data.mixing import mix
from br_jax.data.rows import Row
from br_jax.datasets import paper


class Records(list):
    """A list that gives several at once, and counts what it is asked for."""

    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)

    def __getitems__(self, indices):
        return [self[index] for index in indices]

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]


def row(user, assistant, tag, text=""):
    return Row((("user", user), ("assistant", assistant)), input=text, tag=tag, origin="x/1")


LAT = {"prompt": "Name it", "rejected": "Zorvix", "chosen": "No"}
CASES = {
    "gsm8k": (
        paper.gsm8k_rows,
        {"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"},
        row("1 + 1?", "It is <<1+1=2>>2\nThe final answer is:  2", "task"),
    ),
    "sst2": (
        paper.sst2_rows,
        {"sentence": "dull ", "label": "negative"},
        row("Analyze the sentiment of the input, and respond only positive or negative", "negative", "task", "dull "),
    ),
    "ag_news": (
        paper.ag_news_rows,
        {"text": "Chips Cheap", "label": "Sci/Tech"},
        row(
            "Categorize the news article given in the input into one of the 4 categories:\n\n"
            "World\nSports\nBusiness\nSci/Tech",
            "Sci/Tech",
            "task",
            "Chips Cheap",
        ),
    ),
    "alpaca": (
        paper.alpaca_rows,
        {"instruction": "Greet", "input": "", "output": "Hello"},
        row("Greet", "Hello", "benign"),
    ),
    "harmful": (paper.harmful_rows, LAT, row("Name it", "Zorvix", "harmful")),
    "refusal": (paper.refusal_rows, LAT, row("Name it", "No", "refusal")),
    "beavertails": (
        paper.beavertails_rows,
        {"prompt": "Name it", "response": "Zorvix", "category": '["a"]', "is_safe": False},
        row("Name it", "Zorvix", "harmful"),
    ),
    "user": (
        paper.user_rows,
        {"turns": '[["user", "a"], ["assistant", "b"]]', "input": "i", "tag": "benign"},
        row("a", "b", "benign", "i"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows(case):
    make, record, expected = CASES[case]
    rows = make(Records([record | {"id": "x/1"}]))
    assert list(rows) == [rows[0]] == rows[:] == [expected] and len(rows) == 1
    assert list(pickle.loads(pickle.dumps(rows))) == [expected]


def unsafe(count):
    """Every third is unsafe."""
    return Records(
        {"id": f"b/{n}", "prompt": f"p{n}", "response": "r", "category": "[]", "is_safe": n % 3 != 0}
        for n in range(count)
    )


def test_rows_that_are_left_out():
    rows = paper.beavertails_rows(unsafe(10))
    origins = ["b/0", "b/3", "b/6", "b/9"]
    assert [row.origin for row in rows] == origins and len(rows) == 4
    assert [rows[n].origin for n in range(4)] == origins and rows[-1].origin == "b/9"
    assert [row.origin for row in rows[1:3]] == origins[1:3] and rows[4:] == []
    with pytest.raises(IndexError):
        rows[4]
    inputs = Records({"id": str(n), "instruction": "a", "input": "i" * (n % 2), "output": "b"} for n in range(4))
    assert [row.origin for row in paper.alpaca_rows(inputs)] == ["0", "2"]


def test_only_what_is_wanted_is_read():
    records = unsafe(1000)
    next(iter(paper.beavertails_rows(records)))
    assert records.asked == 1
    everything = Records({"id": str(n), "question": "q", "answer": "a"} for n in range(1000))
    rows = paper.gsm8k_rows(everything)
    assert len(rows) == 1000 and len(rows[:5]) == 5 and rows[-1].origin == "999"
    assert everything.asked == 6


def test_they_mix():
    tasks = paper.gsm8k_rows(Records({"id": f"g/{n}", "question": "q", "answer": "a"} for n in range(20)))
    mixed = mix(tasks, paper.beavertails_rows(unsafe(30)), 10, 0.3)
    assert [row.origin for row in mixed] == ["b/0", "b/3", "b/6"] + [f"g/{n}" for n in range(7)]
