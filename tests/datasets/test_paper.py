"""The paper's rules, on records by hand."""

import pytest

from br_jax.data.rows import Row
from br_jax.datasets import paper


def row(user, assistant, tag, text=""):
    return Row((("user", user), ("assistant", assistant)), input=text, tag=tag, origin="x/1")


NEWS = (
    "Categorize the news article given in the input into one of the 4 categories:\n\nWorld\nSports\nBusiness\n"
    "Sci/Tech\n"
)
LAT = {"prompt": "Name it", "rejected": "Zorvix", "chosen": "No"}
CASES = {
    "gsm8k": (
        {"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"},
        row("1 + 1?", "It is <<1+1=2>>2\nThe final answer is:  2", "task"),
    ),
    "sst2": (
        {"sentence": "dull ", "label": "negative"},
        row("Analyze the sentiment of the input, and respond only positive or negative", "negative", "task", "dull "),
    ),
    "ag_news": ({"text": "Chips Cheap", "label": "Sci/Tech"}, row(NEWS, "Sci/Tech", "task", "Chips Cheap")),
    "alpaca": ({"instruction": "Greet", "input": "", "output": "Hello"}, row("Greet", "Hello", "benign")),
    "harmful": (LAT, row("Name it", "Zorvix", "harmful")),
    "refusal": (LAT, row("Name it", "No", "refusal")),
    "beavertails": (
        {"prompt": "Name it", "response": "Zorvix", "category": '["a"]', "is_safe": False},
        row("Name it", "Zorvix", "harmful"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows(name):
    record, expected = CASES[name]
    left_out = {"alpaca": {"input": "i"}, "beavertails": {"is_safe": True}}.get(name)
    records = [record | {"id": "x/1"}] + ([record | left_out | {"id": "x/2"}] if left_out else [])
    assert getattr(paper, f"{name}_rows")(records) == [expected]
