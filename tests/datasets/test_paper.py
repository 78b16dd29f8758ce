"""The paper's rules on records by hand; the review task on small files of its layout, and on the real one."""

import os
import random
from pathlib import Path

import pytest

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.data.selection import clean
from br_jax.datasets import paper
from br_jax.datasets.paper import SST2_INSTRUCTION, load_reviews


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


NAME = "movieReviewSnippets_GroundTruth.txt"
# Thirty clear opinions of each kind, and ten of none.
LINES = [f"{i}\t{0.6 + i / 10}\tWonderful film number {i}\r\n" for i in range(30)]
LINES += [f"{i}\t{-0.6 - i / 10}\tTerrible film number {i}\r\n" for i in range(30)]
LINES += [f"{i}\t{(i - 5) / 10}\tA film number {i}\r\n" for i in range(10)]


@pytest.fixture
def load(tmp_path):
    """load(lines, **settings) writes the file and splits it."""

    def write_and_load(lines, **settings):
        path = tmp_path / NAME
        path.write_bytes("".join(lines).encode() if isinstance(lines, list) else lines)
        return load_reviews(path, **({"test": 8, "validation": 4} | settings))

    return write_and_load


def texts(*parts):
    return [row.input for part in parts for row in part]


def test_reviews_are_split_by_text_and_seed(load):
    train, validation, test = parts = load(LINES)
    assert (len(train), len(validation), len(test)) == (48, 4, 8)
    assert [[row.turns[1][1] for row in part].count("positive") for part in (validation, test)] == [2, 4]
    assert len(set(texts(*parts))) == 60 and not any(text.startswith("A film") for text in texts(*parts))
    for row in train + validation + test:
        label = "positive" if row.input.startswith("Wonderful") else "negative"
        assert row.turns == (("user", SST2_INSTRUCTION), ("assistant", label))
        assert row.tag == "task" and NAME in row.origin
    before, shuffled = [texts(part) for part in parts], random.Random(0).sample(LINES, len(LINES))
    assert [texts(part) for part in load(shuffled)] == before and texts(load(LINES, seed=1)[2]) != before[2]
    assert len(set(texts(load([*LINES, "99\t2.0\tQuite another film\r\n"])[2])) - set(before[2])) <= 1


def test_copies_stay_in_one_split_and_contradictions_go(load):
    copies = [f"{i}\t1.0\tWONDERFUL  film, number {i}!\r\n" for i in range(30)]
    parts = load([*LINES, *copies, "0\t-2.0\twonderful film number 3\r\n"])
    everything = [text.lower().rstrip("!").replace(",", "") for text in texts(*parts)]
    assert len(everything) == len(set(everything)) == 59 and "wonderful film number 3" not in everything


def test_cleaning_encodings_malformed_lines_and_too_few(load):
    assert clean(" Lovely &amp;  Amazing ''Wasabi''\u00a0cafe\u0301 ") == 'Lovely & Amazing "Wasabi" café'
    windows = "1\t2.0\tA na\xefve tale \x96 charming".encode("latin-1") + b"\r\n\r\n"
    parts = load(b"\xef\xbb\xbf" + "".join(LINES).encode() + windows)
    assert "A naïve tale \u2013 charming" in texts(*parts)
    for bad in ("1\tgood\tA film\n", "1\t2.0\n"):
        with pytest.raises(UserError, match=f"{NAME}:71: not an id, a rating and a sentence between tabs; fetch"):
            load([*LINES, bad])
    with pytest.raises(UserError, match="30 positive sentences, and more than 536 are needed"):
        load(LINES, test=872, validation=200)


REAL = Path(os.environ.get("BR_JAX_DATA", "data")) / NAME


@pytest.mark.skipif(not REAL.is_file(), reason="run experiments/fetch.py, or set BR_JAX_DATA")
def test_the_real_file():
    train, validation, test = load_reviews(REAL)
    assert (len(validation), len(test)) == (200, 872) and 8800 < len(train) < 9000
    assert [row.turns[1][1] for row in test].count("positive") == 436
    everything = texts(train, validation, test)
    assert len(everything) == len(set(everything))
    assert not any("&amp;" in text or "\ufffd" in text or "  " in text for text in everything)
