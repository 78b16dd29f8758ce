"""Kappa against its definition in float64, with confusion matrices, on random tables."""

import json

import numpy as np
import pytest

from br_jax.scoring.judges.agreement import cohen_kappa, compare_judges
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
            if len(set(first) | set(second)) == 2:
                found = cohen_kappa(first.tolist(), second.tolist())
                assert found == pytest.approx(kappa_by_matrices(first, second), abs=1e-12)
                values.append(found)
    assert len(values) > 80 and min(values) < 0 < max(values)


def test_by_hand():
    """Cohen's kind of example: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: (0.7 - 0.5) / (1 - 0.5)."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1 and cohen_kappa(first, [not verdict for verdict in first]) == -1
    assert cohen_kappa([True] * 5, [True] * 5) is None
    # One judge that never changes its mind agrees as far as chance goes.
    assert cohen_kappa([True] * 4, [True, False, True, True]) == cohen_kappa([True] * 4, [False] * 4) == 0


def test_every_pair_once_and_as_json():
    verdicts = {"a": (True, False, True), "b": (True, True, True), "c": (True, True, True)}
    table = compare_judges({name: [Judgement(verdict) for verdict in found] for name, found in verdicts.items()})
    assert [row["judges"] for row in table] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [row["kappa"] for row in table] == [0, 0, None]
    assert [row["agreement"] for row in table] == [2 / 3, 2 / 3, 1] and {row["n"] for row in table} == {3}
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert compare_judges({"a": [], "b": []}) == [{"judges": ["a", "b"], "n": 0, "agreement": None, "kappa": None}]
