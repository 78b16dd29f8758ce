"""Variances against statsmodels and SciPy, intervals against published ones and closed forms; kappa in float64."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from benchmarks.coverage import coverage
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, nct, norm, sem, t, ttest_rel

from br_jax.scoring.statistics import Sample, cohen_kappa, difference, estimate

# Of unequal groups in unequal seeds, which the first two differ by and the third does not.
GROUPS, SEEDS = [(i * i + i // 5) % 7 for i in range(60)], [i // 7 % 3 for i in range(60)]
FIRST = Sample([(7 * i * i + 3 * i) % 11 < 1 + 4 * seed for i, seed in enumerate(SEEDS)], GROUPS, SEEDS)
SECOND = Sample([(5 * i + i // 3) % 7 < 5 - seed for i, seed in enumerate(SEEDS)], GROUPS, SEEDS)
THIRD = FIRST._replace(values=[(7 * i * i + 3 * i) % 11 < 4 for i in range(60)])
F, S = 7, 3


def ones(k, n, groups=None, seed=0):
    return Sample.of([1] * k + [0] * (n - k), groups, seed)


def ends(found):
    return found.low, found.high


@pytest.mark.parametrize(("found", "by_group", "by_seed", "by_both"), [
    (estimate(FIRST), 0.005340277777777783, 0.02472638888888891, 0.007004166666666676),
    (estimate(THIRD), 0.0043958333333333375, 0.00014305555555555575, 0.0025041666666666706),
    (difference(FIRST, SECOND), 0.015043981481481393, 0.06267638888888846, 0.017451080246913466),
])  # fmt: skip
def test_variances_are_statsmodels_own(found, by_group, by_seed, by_both):
    """statsmodels 0.15.0: `OLS(values, model).fit(cov_type="cluster")` with groups, seeds, and both, uncorrected."""
    by_group, by_seed, by_both = by_group * F / (F - 1), by_seed * S / (S - 1), by_both * F * S / ((F - 1) * (S - 1))
    variance = by_group + max(0, by_seed - by_both)
    freedom = max(S - 1, variance**2 / (by_group**2 / (F - 1) + by_seed**2 / (S - 1)))
    known = [(t.ppf(0.975, freedom) * variance**0.5, variance, freedom)]
    known += [(t.ppf(0.975, S - 1) * by_seed**0.5, by_seed, S - 1)]
    assert (found.variance, found.freedom) == pytest.approx(max(known)[1:], rel=1e-12)
    assert (found.n, found.groups) == (60, 7)


def test_variances_are_scipy_s_where_it_has_them():
    rng = np.random.default_rng(0)
    values = rng.random((12, 8)) < rng.random(12)[:, None]
    found = estimate(Sample.of(values.ravel(), np.repeat(range(12), 8)))
    assert (found.variance, found.freedom) == (pytest.approx(sem(values.mean(1)) ** 2), 11), "equal groups: their means"
    found = estimate(Sample(values.ravel(), [0] * 96, np.tile(range(8), 12)))
    assert (found.variance, found.freedom) == (pytest.approx(sem(values.mean(0)) ** 2), 7), "of one group: the seeds'"
    first, second = rng.random(50) < 0.7, rng.random(50) < 0.4
    found, paired = difference(Sample.of(first), Sample.of(second)), ttest_rel(first * 1.0, second * 1.0)
    assert found.mean / math.sqrt(found.variance) == pytest.approx(paired.statistic) and found.freedom == paired.df
    # Noncentral t: what the smallest visible difference is found by, but for the other side.
    power = nct.sf(t.ppf(0.975, 49), 49, found.visible / math.sqrt(found.variance))
    assert power == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(("k", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)])
def test_unrelated_prompts_of_one_seed_have_wilson_s_interval(k, n, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3, but for t of n - 1 prompts."""
    found = estimate(ones(k, n))
    assert ends(found) == pytest.approx((low, high), abs=1e-3) and found.by_seed == {0: k / n}
    roots = np.roots([1 + (z := t.ppf(0.975, n - 1) ** 2 / (n - 1)), -2 * k / n - z, (k / n) ** 2])
    assert ends(found) == pytest.approx(sorted(roots)), "where (k / n - p)^2 = t^2 p (1 - p) / (n - 1)"


@pytest.mark.parametrize(("values", "k"), [([0] * 20, 0), ([1] * 20, 20), ([0.2, 0.3] * 10, 5), ([0.25] * 20, 5)])
def test_without_more_spread_than_chance_it_is_that_of_all_prompts(values, k):
    """SciPy's of k in 20 at the confidence that t has."""
    expected = binomtest(k, 20).proportion_ci(2 * norm.cdf(t.ppf(0.975, 19)) - 1, "wilson")
    assert ends(estimate(Sample.of(values))) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("a", "b", "low", "high"), [((56, 70), (48, 80), 0.0524, 0.3339),
    ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)])  # fmt: skip
def test_a_difference_without_anything_in_common_is_newcombe_s(a, b, low, high):
    """Newcombe, 873-890, table II, method 10: with t for z, which of few prompts is wider and of many the same."""
    for times, near in ((1, 0.14), (100, 1e-4)):
        (k1, n1), (k2, n2) = ((times * x for x in each) for each in (a, b))
        (l1, u1), (l2, u2) = (binomtest(*each).proportion_ci(method="wilson") for each in ((k1, n1), (k2, n2)))
        p1, p2 = k1 / n1, k2 / n2
        known = p1 - p2 - math.hypot(p1 - l1, u2 - p2), p1 - p2 + math.hypot(u1 - p1, p2 - l2)
        assert times > 1 or known == pytest.approx((low, high), abs=5e-5)
        found = difference(ones(k1, n1), ones(k2, n2)._replace(groups=range(-n2, 0)))
        assert ends(found) == pytest.approx(known, abs=near) and found.low < known[0]


def test_a_difference_on_the_same_prompts_is_zou_and_donner_s():
    """Statistics in Medicine 27 (2008) 1693-1702: less by the correlation of the two."""
    rng = np.random.default_rng(1)
    first = rng.random(80) < 0.6
    second = np.where(rng.random(80) < 0.3, rng.random(80) < 0.4, first)
    one, other, r = Sample.of(first), Sample.of(second), np.corrcoef(first, second)[0, 1]
    gap, longer = (p1 := first.mean()) - (p2 := second.mean()), t.ppf(0.975, 79) / norm.ppf(0.975)
    z = norm.ppf(0.975) ** 2 / 79  # Wilson's ends: where (p - end)^2 = z^2 end (1 - end) / 79
    (l1, u1), (l2, u2) = (sorted(np.roots([1 + z, -2 * p - z, p**2])) for p in (p1, p2))
    below, above = (
        longer * math.sqrt(a**2 + b**2 - 2 * r * a * b) for a, b in ((p1 - l1, u2 - p2), (u1 - p1, p2 - l2))
    )
    assert ends(difference(one, other)) == pytest.approx((gap - below, gap + above)) and 0.5 < r < 0.9
    none = binomtest(0, 80).proportion_ci(2 * norm.cdf(t.ppf(0.975, 79)) - 1, "wilson").high
    assert ends(difference(ones(40, 80), ones(40, 80))) == pytest.approx((-none, none), rel=0.05), "none of 80 differs"


SHARES = st.booleans() | st.floats(0, 1).map(lambda value: round(value, 3))
LINES = st.lists(st.tuples(SHARES, st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40)


@given(LINES, LINES, st.randoms(use_true_random=False))
def test_the_order_and_the_names_of_prompts_are_nothing_to_an_interval(first, second, random):
    def sample(lines, sign=1):
        return Sample(*map(list, zip(*((value, sign * g, s) for value, g, s in lines), strict=True)))

    one, other = sample(first), sample(second)
    mixed = [sample(random.sample(each, len(each)), -1) for each in (first, second)]
    found, again = difference(one, other), difference(*mixed)
    assert (found is None) == (again is None) == (not {*one.seeds} & {*other.seeds})
    for each, other_way in ((estimate(one), estimate(mixed[0])), (found, again)) if found else ():
        numbers = [(x.mean, x.low, x.high, x.variance, x.freedom) for x in (each, other_way)]
        assert numbers[0] == pytest.approx(numbers[1]) and -1 <= each.low <= each.mean <= each.high <= 1
    assert not found or ends(difference(other, one)) == pytest.approx((-found.high, -found.low))
    told = json.loads(json.dumps(estimate(one).to_json(), allow_nan=False))
    assert told["n"] == len(first) and 0 <= told["low"] <= told["score"] <= told["high"] <= 1


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(2, 9))
def test_prompts_of_one_group_are_worth_less_than_as_many_others(values, times):
    alone, often = estimate(Sample.of(values)), estimate(Sample.of(values * times, [*range(len(values))] * times))
    many = estimate(Sample.of(values * times))
    assert often.variance == pytest.approx(alone.variance) and often.n == times * len(values)
    certain = often.mean in (0, 1)
    assert certain or (often.low < many.low and many.high < often.high)
    effect = math.nan if certain else often.n / (len(values) - 1)
    assert often.design_effect == pytest.approx(effect, nan_ok=True)


def test_what_one_group_one_seed_and_seeds_apart_say():
    assert ends(estimate(ones(3, 9, ["story"] * 9))) == (0, 1), "nothing is known of other phrasings"
    assert difference(ones(3, 9, ["story"] * 9), ones(3, 9, ["story"] * 9)).high > 0.7
    nothing = estimate(Sample.of([])), difference(ones(1, 2), ones(1, 2, seed=1)), difference(ones(1, 2), ones(0, 0))
    assert nothing == (None, None, None)
    both = [Sample.join([ones(k, 40), ones(30, 40, seed=1)]) for k in (9, 3)]
    third = Sample.join([both[0], ones(40, 40, seed=2)])
    found = difference(*both)
    assert difference(third, both[1]) == found and found.by_seed == pytest.approx({0: 0.15, 1: 0})
    fewer = difference(ones(30, 40), ones(4, 10))
    assert (fewer.mean, fewer.n, fewer.groups) == (pytest.approx(0.35), 10, 10)
    # Seeds that answer all phrasings alike and each other not at all: not as many trials as there are prompts.
    for shares, n in itertools.product(((1, 0), (1, 1, 0), (0.9, 0.2, 0.5)), (3, 30)):
        apart = estimate(Sample.join([Sample.of([share] * n, seed=seed) for seed, share in enumerate(shares)]))
        assert apart.low < 0.1 and apart.high > 0.9 and apart.freedom >= 1
    # But not what differs in a model that differs from it alike in every seed.
    one, other = (Sample.join([ones(k + of_one, 40, seed=k) for k in (4, 18, 30)]) for of_one in (4, 0))
    found = difference(one, other)
    assert found.high - found.low < 2.2 * t.ppf(0.975, found.freedom) * math.sqrt(found.variance)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="outcomes must be in"):
            estimate(Sample.of([0.5, value]))


def test_what_would_settle_it_is_as_many_more_as_the_distance_asks_for():
    found = dataclasses.replace(estimate(FIRST), mean=0.1, low=0.04, high=0.18)
    assert found.needed(0.14) == (4 * F, 4 * S) and found.needed(0.08) == (9 * F, 9 * S)
    assert found.needed(0.9) == (F, S) and found.needed(0.1004) is None


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    score, _, gap, _ = coverage(rate=0.1, spreads=(1.0, 0.3), seeds=5, draws=200)
    assert 0.9 <= score <= 0.99 and 0.9 <= gap <= 0.99


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
