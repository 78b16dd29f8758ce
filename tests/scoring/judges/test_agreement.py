"""Kappa against its definition in float64, with confusion matrices, on random tables."""

import json

import numpy as np
import pytest

from br_jax.scoring.judges.agreement import cohen_kappa, compare_judges, plain_agreement
from br_jax.scoring.judges.judging import Judgement


def kappa_by_matrices(first, second):
    """1 - observed disagreement / expected disagreement, as scikit-learn has it."""
    confusion = np.zeros((2, 2))
    np.add.at(confusion, (np.asarray(first, int), np.asarray(second, int)), 1)
    expected = np.outer(confusion.sum(1), confusion.sum(0)) / confusion.sum()
    off = 1 - np.eye(2)
    return 1 - (off * confusion).sum() / (off * expected).sum()


def test_random_tables():
    rng = np.random.default_rng(0)
    values = []
    for n in (*range(2, 30), 1000):
        for share in (0.05, 0.3, 0.5, 0.9):
            first = rng.random(n) < share
            second = np.where(rng.random(n) < 0.3, ~first, first)
            if len(set(first) | set(second)) < 2:
                continue
            found = cohen_kappa(first.tolist(), second.tolist())
            assert found == pytest.approx(kappa_by_matrices(first, second), abs=1e-12)
            assert found == cohen_kappa(second.tolist(), first.tolist())
            assert plain_agreement(first.tolist(), second.tolist()) == pytest.approx(np.mean(first == second))
            values.append(found)
    assert len(values) > 80 and min(values) < 0 < max(values)


def test_by_hand():
    """Cohen's kind of example: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: (0.7 - 0.5) / (1 - 0.5)."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(first, [not verdict for verdict in first]) == -1


@pytest.mark.parametrize("verdict", [True, False])
def test_one_class_only_is_undefined(verdict):
    assert cohen_kappa([verdict] * 5, [verdict] * 5) is None
    assert plain_agreement([verdict] * 5, [verdict] * 5) == 1
    # One judge that never changes its mind agrees as far as chance goes.
    assert cohen_kappa([verdict] * 4, [True, False, True, True]) == 0
    assert cohen_kappa([verdict] * 4, [not verdict] * 4) == 0


def test_nothing_judged():
    assert cohen_kappa([], []) is None and plain_agreement([], []) is None


def test_unequal_lengths_are_a_mistake():
    with pytest.raises(ValueError):
        cohen_kappa([True], [True, False])


def test_every_pair_once_and_as_json():
    judged = {
        "a": [Judgement(True), Judgement(False), Judgement(True)],
        "b": [Judgement(True), Judgement(True), Judgement(True)],
        "c": [Judgement(True), Judgement(True), Judgement(True)],
    }
    table = compare_judges(judged)
    assert [row["judges"] for row in table] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [row["kappa"] for row in table] == [0, 0, None]
    assert [row["agreement"] for row in table] == [2 / 3, 2 / 3, 1] and {row["n"] for row in table} == {3}
    assert json.loads(json.dumps(table, allow_nan=False)) == table
