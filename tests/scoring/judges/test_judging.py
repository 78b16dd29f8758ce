"""Verdicts that are kept: a stopped judging goes on, and nothing that was saved is judged again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from br_jax.core.store import Store
from br_jax.scoring.judges.base import Exchange, Judgement, compare_judges, digest, judge_all


class Counting:
    """Judges by the answer's length, remembers what it was given, and may die at a batch."""

    batch_size = 3

    def __init__(self, name="counting", version="1", dies_at=None):
        self.name, self.version, self.dies_at, self.batches = name, version, dies_at, []

    def __call__(self, exchanges):
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append([exchange.answer for exchange in exchanges])
        return [self.verdict(exchange.answer) for exchange in exchanges]

    @staticmethod
    def verdict(answer):
        return Judgement(len(answer) % 2 == 0, len(answer) / 3, answer[:3])

    @property
    def seen(self):
        return [answer for batch in self.batches for answer in batch]


LENGTHS = (5, 1, 9, 2, 1, 7, 0)
EXCHANGES = [Exchange("p", "x" * n) for n in LENGTHS]
EXPECTED = [Judgement(n % 2 == 0, n / 3, "x" * min(n, 3)) for n in LENGTHS]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "verdicts.jsonl"


def test_each_is_judged_once_and_shorter_ones_first(tmp_path, file, monkeypatch):
    judge = Counting()
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED
    assert judge.batches == [["", "x", "xx"], ["x" * 5, "x" * 7, "x" * 9]]
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED and len(judge.seen) == 6
    file.unlink()
    monkeypatch.chdir(tmp_path)
    assert judge_all(Counting(), EXCHANGES) == EXPECTED
    assert judge_all(Counting(), []) == [] and not list(tmp_path.glob("[!.]*")), "no store is no file"


def test_stopped_again_and_again_the_file_is_that_of_an_undisturbed_run(tmp_path, file):
    exchanges = [Exchange(f"question {i % 9}", f"answer {i} {'!' * (i % 13)}") for i in (*range(40), *range(10))]
    straight, judged = tmp_path / "straight.jsonl", []
    judge_all(Counting(), exchanges, Store(straight))
    for batches in (0, 2, 5):
        judge = Counting(dies_at=batches)
        with pytest.raises(KeyboardInterrupt):
            judge_all(judge, exchanges, Store(file))
        judged += judge.seen
        if batches:
            with file.open("rb+") as half:  # as a kill in the middle of a write leaves it
                half.truncate(file.stat().st_size - 9)
    last = Counting()
    judge_all(last, exchanges, Store(file))
    assert file.read_bytes() == straight.read_bytes()
    assert len(judged + last.seen) == 40 + 2 and set(judged + last.seen) == {e.answer for e in exchanges}


@pytest.mark.parametrize("other", [Counting("another"), Counting(version="2")])
def test_judges_share_a_file_and_no_verdict_and_no_text_is_in_it(file, other):
    judge_all(Counting(), [*EXCHANGES, Exchange("oil a zorvix", "turn the crank")], Store(file))
    judge_all(other, EXCHANGES, Store(file))
    assert len(other.seen) == 6
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({record["key"] for record in records}) == 13
    assert "zorvix" not in file.read_text() and "crank" not in file.read_text()


@given(st.lists(st.text(st.characters()), max_size=3), st.lists(st.text(st.characters()), max_size=3))
def test_other_texts_have_another_digest(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)
    assert digest("\ud800") != digest("\ud801") and digest("a\0b", "c") != digest("a", "b\0c")


def test_every_pair_of_judges_is_compared_once():
    verdicts = {"a": (True, False, True), "b": (True, True, True), "c": (True, True, True)}
    table = compare_judges({name: [Judgement(verdict) for verdict in found] for name, found in verdicts.items()})
    assert [row["judges"] for row in table] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [row["kappa"] for row in table] == [0, 0, None]
    assert [row["agreement"] for row in table] == [2 / 3, 2 / 3, 1] and {row["n"] for row in table} == {3}
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert compare_judges({"a": [], "b": []}) == [{"judges": ["a", "b"], "n": 0, "agreement": None, "kappa": None}]
