"""Intervals against published values and SciPy; kappa against its definition in float64."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, sem, t, ttest_1samp

from br_jax.scoring.statistics import Mean, Score, cohen_kappa, difference, mcnemar, read_score, t_interval, wilson


def test_intervals_are_the_published_ones():
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    for k, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    for a, b, expected in (  # 873-890, table II, method 10
        ((56, 70), (48, 80), (0.2, 0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.6, 0.1705, 0.8090)),
        ((10, 10), (0, 20), (1.0, 0.6791, 1.0)),
    ):
        assert difference(Score(*a), Score(*b)) == pytest.approx(expected, abs=5e-5)
    assert difference(Score(9, 10), Score(0, 0)) is difference(Mean.of([0.5]), Mean.of([])) is None


def test_scores_are_possible_and_survive_json():
    for kind, fields in ((Score, (-1, 3)), (Score, (4, 3)), (Mean, (-1, 0.0, 0.0)), (Mean, (2, math.nan, 0.0))):
        with pytest.raises(ValueError, match="need"):
            kind(*fields)
    empty = read_score(None)
    assert (wilson(0, 0), empty.score) == ((0.0, 1.0), None)
    for score in (Score(8, 100), empty):
        stored = json.loads(json.dumps(score.to_json(), allow_nan=False))
        assert set(stored) == {"k", "n", "score", "low", "high"} and read_score(stored) == score
    assert Score(8, 100).interval == pytest.approx((0.041, 0.150), abs=5e-4)


shares = st.floats(0, 1).map(lambda value: round(value, 6))  # no spread that underflows


@given(st.lists(shares, min_size=2, max_size=30).filter(lambda scores: len(set(scores)) > 1))
def test_a_mean_s_interval_is_scipys(scores):
    mean, expected = Mean.of(scores), ttest_1samp(scores, 0).confidence_interval(0.95)
    assert mean.interval == pytest.approx((max(expected.low, 0), min(expected.high, 1)), abs=1e-9)
    assert mean.score == pytest.approx(sum(scores) / len(scores)) and mean.n == len(scores)


@given(st.one_of(st.lists(st.floats(0, 1), max_size=30), st.lists(st.sampled_from((0.0, 1.0)), max_size=300)))
def test_a_mean_s_interval_holds_it(scores):
    mean = Mean.of(scores)
    for low, high in (mean.interval, wilson(round(sum(scores)), len(scores))):
        assert 0 <= low <= high <= 1
    assert mean.interval[0] <= (mean.score if scores else 0.5) <= mean.interval[1]
    stored = json.loads(json.dumps(mean.to_json(), allow_nan=False))
    assert set(stored) == {"n", "score", "deviation", "low", "high"} and read_score(stored) == mean
    assert Mean.of([0.0] * 20).interval == wilson(0, 20), "equal scores are not certain"


def test_t_interval_is_scipys():
    for values in ([0.1, 0.2], [0.80, 0.84, 0.79], [0.5, 0.52, 0.47, 0.5, 0.61]):
        expected = t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem(values))
        assert t_interval(values, (-9.0, 9.0)) == pytest.approx((np.mean(values), *expected), rel=1e-9)
        assert t_interval(values) == pytest.approx((np.mean(values), *np.clip(expected, 0, 1)), rel=1e-9)
    assert t_interval([0.25]) == (0.25, None, None) and t_interval([0.25] * 3) == (0.25, 0.25, 0.25)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300))
def test_mcnemar_is_the_sign_test_of_the_pairs_that_differ(pairs):
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    # SciPy refuses a test of nothing; nothing is no evidence.
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(pairs) == (first, second, pytest.approx(expected, rel=1e-9))


def test_kappa_is_one_minus_disagreement_by_what_is_expected_of_it():
    rng, values = np.random.default_rng(0), []
    for n in (*range(2, 30), 1000):
        for share in (0.05, 0.3, 0.5, 0.9):
            first = rng.random(n) < share
            second = np.where(rng.random(n) < 0.3, ~first, first)
            if len(set(first) | set(second)) == 2:
                confusion = np.zeros((2, 2))
                np.add.at(confusion, (first.astype(int), second.astype(int)), 1)
                expected, off = np.outer(confusion.sum(1), confusion.sum(0)) / confusion.sum(), 1 - np.eye(2)
                values.append(cohen_kappa(first.tolist(), second.tolist()))
                assert values[-1] == pytest.approx(1 - (off * confusion).sum() / (off * expected).sum(), abs=1e-12)
    assert len(values) > 80 and min(values) < 0 < max(values)
    # Cohen's kind of example: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: (0.7 - 0.5) / (1 - 0.5).
    first, second = [True] * 25 + [False] * 25, [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4) and cohen_kappa([True] * 5, [True] * 5) is None
    # One judge that never changes its mind agrees as far as chance goes.
    assert cohen_kappa([True] * 4, [True, False, True, True]) == cohen_kappa([True] * 4, [False] * 4) == 0
