"""The review task on small files of its layout, and on the real file where it is."""

import os
import random
from pathlib import Path

import pytest

from br_jax.core.errors import UserError
from br_jax.data.selection import clean
from br_jax.datasets.paper import SST2_INSTRUCTION, load_reviews

NAME = "movieReviewSnippets_GroundTruth.txt"
SPLIT = {"test": 8, "validation": 4}


def line(number, rating, text):
    return f"{number}\t{rating}\t{text}\r\n"


@pytest.fixture
def lines():
    """Thirty clear opinions of each kind, and ten of none."""
    positive = [line(i, 0.6 + i / 10, f"Wonderful film number {i}") for i in range(30)]
    negative = [line(i, -0.6 - i / 10, f"Terrible film number {i}") for i in range(30)]
    return positive + negative + [line(i, (i - 5) / 10, f"A film number {i}") for i in range(10)]


@pytest.fixture
def load(tmp_path):
    """load(lines, **settings) writes the file and splits it."""

    def write_and_load(lines, **settings):
        path = tmp_path / NAME
        path.write_bytes("".join(lines).encode() if isinstance(lines, list) else lines)
        return load_reviews(path, **(SPLIT | settings))

    return write_and_load


def texts(part):
    return [row.input for row in part]


def test_splits(load, lines):
    train, validation, test = load(lines)
    assert (len(train), len(validation), len(test)) == (48, 4, 8)
    assert [[row.turns[1][1] for row in part].count("positive") for part in (validation, test)] == [2, 4]
    everything = texts(train + validation + test)
    assert len(set(everything)) == 60 and not any(text.startswith("A film") for text in everything)
    for row in train + validation + test:
        label = "positive" if row.input.startswith("Wonderful") else "negative"
        assert row.turns == (("user", SST2_INSTRUCTION), ("assistant", label))
        assert row.tag == "task" and NAME in row.origin


def test_a_split_depends_on_text_and_seed_only(load, lines):
    before = [texts(part) for part in load(lines)]
    random.Random(0).shuffle(lines)
    assert [texts(part) for part in load(lines)] == before
    assert texts(load(lines, seed=1)[2]) != before[2]
    more = [*lines, line(99, 2.0, "Quite another film")]
    assert len(set(texts(load(more)[2])) - set(before[2])) <= 1


def test_copies_stay_in_one_split_and_contradictions_go(load, lines):
    copies = [line(i, 1.0, f"WONDERFUL  film, number {i}!") for i in range(30)]
    contradiction = [line(0, -2.0, "wonderful film number 3")]
    parts = load(lines + copies + contradiction)
    everything = [text.lower().rstrip("!").replace(",", "") for part in parts for text in texts(part)]
    assert len(everything) == len(set(everything)) == 59
    assert "wonderful film number 3" not in everything


def test_cleaning_and_encodings(load, lines):
    assert clean(" Lovely &amp;  Amazing ''Wasabi''\u00a0cafe\u0301 ") == 'Lovely & Amazing "Wasabi" café'
    windows = "1\t2.0\tA na\xefve tale \x96 charming".encode("latin-1") + b"\r\n\r\n"
    parts = load(b"\xef\xbb\xbf" + "".join(lines).encode() + windows)
    assert "A naïve tale \u2013 charming" in [text for part in parts for text in texts(part)]


def test_malformed_lines_and_too_few(load, lines):
    for bad in ("1\tgood\tA film\n", "1\t2.0\n"):
        with pytest.raises(UserError, match=f"{NAME}:71: not an id, a rating and a sentence between tabs; fetch"):
            load([*lines, bad])
    with pytest.raises(UserError, match="30 positive sentences, and more than 536 are needed"):
        load(lines, test=872, validation=200)


REAL = Path(os.environ.get("BR_JAX_DATA", "data")) / NAME


@pytest.mark.skipif(not REAL.is_file(), reason="run experiments/fetch.py, or set BR_JAX_DATA")
def test_the_real_file():
    train, validation, test = load_reviews(REAL)
    assert (len(validation), len(test)) == (200, 872)
    assert [row.turns[1][1] for row in test].count("positive") == 436
    assert 8800 < len(train) < 9000
    everything = texts(train + validation + test)
    assert len(everything) == len(set(everything))
    assert not any("&amp;" in text or "\ufffd" in text or "  " in text for text in everything)
