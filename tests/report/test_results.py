"""Rows over seeds: their order, their intervals, differences and tests, held against SciPy and hand-made counts."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, sem, t

from br_jax.report.results import Setting, absent, gap, make_frame, one_strength, paired
from br_jax.scoring.statistics import Score, difference


def rows_of(cells):
    return next(iter(make_frame(cells).values()))


@pytest.fixture
def row(make_cell):
    """row(method, a, field, {seed: value}) -> the row of cells that differ by seed in one field of `make_cell`."""

    def make(method, field, by_seed, a=None, **same):
        return rows_of(make_cell(method, a, seed=s, **{field: value}, **same) for s, value in by_seed.items())[0]

    return make


def test_rows_are_in_order_whatever_order_the_cells_are_in(make_grid, make_cell):
    cells = [*make_grid(a=(1.0, 0.0)), make_cell("aligned", n=90), make_cell("later", p=0.1)]
    groups = make_frame(cells[::-1])
    assert [setting.n for setting in groups] == [90, 800]
    rows = groups[Setting("models/Tiny.gguf", "reviews", "devices", 800)]
    at = [(row.method, row.a) for row in rows if row.p == 0.1]
    names = ["aligned", "sft", "buffer_only", "reinforce_only", "reinforce_only", "average", "ours", "ours", "later"]
    assert at == list(zip(names, [None, None, None, 0.0, 1.0, None, 0.0, 1.0, None], strict=True))
    assert [row.p for row in rows] == sorted(row.p for row in rows)
    assert list(rows[0].scores) == [42, 43, 44]


def test_cells_of_other_prompts_are_not_compared(make_cell):
    """Such as those that are left of another split; of cells that do not say it is not known."""
    for mine, theirs, compared in (("a", "a", True), ("a", "b", False), (None, "b", True)):
        cells = [make_cell("sft", harmful=80), make_cell("aligned", harmful=5)]
        for cell, suite in zip(cells, (mine, theirs), strict=True):
            cell["scores"] |= {"suite": suite} if suite else {}
        aligned, sft = rows_of(cells)
        assert (gap(sft, aligned, "harmful") is not None) == (paired(sft, aligned, "harmful") is not None) == compared


def test_an_estimate_is_students_over_seeds(row):
    found = row("sft", "harmful", {1: 80, 2: 84, 3: 91}).estimate("harmful")
    shares = [0.80, 0.84, 0.91]
    low, high = t.interval(0.95, 2, loc=np.mean(shares), scale=sem(shares))
    assert found[:3] == pytest.approx((0.85, low, high)) and (len(found.by_seed), found.own) == (3, False)


def test_without_a_spread_it_is_one_seeds_own_and_of_the_smaller_sample(row):
    expected = binomtest(7, 100).proportion_ci(method="wilson")
    for counts in ({1: 7}, {1: 7, 2: 7, 3: 7}):
        found = row("sft", "harmful", counts).estimate("harmful")
        assert found[:3] == pytest.approx((0.07, expected.low, expected.high), abs=1e-5)
        assert (len(found.by_seed), found.own) == (len(counts), True)
    found = row("sft", "prompts", {1: 100, 2: 20}, harmful=0).estimate("harmful")
    assert found.high == Score(0, 20).interval[1]


def test_what_was_not_measured_does_not_count(make_cell, row):
    both = rows_of([make_cell("sft", seed=1, prompts=0, harmful=0), make_cell("sft", seed=2, harmful=5)])[0]
    assert list(both.counted("harmful")) == [2] and len(both.estimate("harmful").by_seed) == 1
    assert row("sft", "prompts", {1: 0}, harmful=0).estimate("harmful") is None
    values = dict(enumerate((math.nan, None, 4.0, math.inf)))
    assert row("sft", "perplexity", values).numbers("perplexity") == {2: 4.0}


def test_a_gap_is_over_the_seeds_that_both_have(row):
    first = row("sft", "harmful", {1: 80, 2: 90, 3: 99})
    found = gap(first, row("aligned", "harmful", {2: 10, 3: 5, 4: 50}), "harmful")
    assert found.by_seed == pytest.approx({2: 0.80, 3: 0.94})
    # Two seeds: t = 12.706 at one degree of freedom, clipped at 1.
    assert (found.mean, found.low, found.high) == pytest.approx((0.87, 0.87 - 12.7062 * 0.07, 1.0), abs=1e-5)
    assert gap(first, None, "harmful") is None
    assert gap(first, row("aligned", "harmful", {9: 1}), "harmful") is None
    one = gap(first, row("aligned", "harmful", {1: 0}), "harmful")
    assert one.mean == 0.8 and one.own, "one seed: the interval of its own prompts"
    assert (one.low, one.high) == difference(Score(80, 100), Score(0, 100))[1:]


def test_a_gap_in_perplexity_is_not_clipped(row):
    first = row("ours", "perplexity", dict(enumerate((9.0, 12.0, math.nan))), 0.1)
    found = gap(first, row("sft", "perplexity", dict.fromkeys(range(3), 4.0)), "perplexity")
    assert found.by_seed == {0: 5.0, 1: 8.0} and found.mean == 6.5 and found.high > 20


def test_pairs_are_the_same_prompts_of_the_same_seeds(make_cell, row):
    first = row("ours", "begin", {1: 0, 2: 4, 3: 0}, 0.1, harmful=6)
    # Seed 1 agrees; in seed 2 prompts 6 to 9 are the first's alone and 0 to 3 the second's.
    assert paired(first, row("sft", "harmful", {1: 6, 2: 6, 9: 6}), "harmful") == (4, 4, 1.0, 2)
    assert paired(first, row("sft", "prompts", {1: 99}, harmful=0), "harmful") is None
    assert paired(first, None, "harmful") is None
    cell = make_cell("sft")
    cell["scores"]["outcomes"]["task"] = [0.5] * 200  # no yes or no
    assert paired(rows_of([cell])[0], rows_of([make_cell("aligned")])[0], "task") is None


def test_one_a_is_a_qr_and_the_one_with_most_cells(make_grid, make_cell):
    few = [make_cell("ours", a, p=0.1, seed=s) for a, s in ((0.1, 1), (1.0, 1), (1.0, 2), (0.0, 1), (0.0, 2), (0.0, 3))]
    assert [row.a for row in one_strength(rows_of(few))] == [1.0]
    assert {row.a for row in one_strength(rows_of(make_grid(a=(1.0, 0.5, 0.0))))} == {None, 0.5}
    assert [row.a for row in one_strength(rows_of(few[3:]))] == [0.0]


def test_what_is_absent_is_said(make_grid, make_cell):
    assert absent(make_frame(make_grid())) == []
    cells = [c for c in make_grid() if (c["method"], c["run"]["p"], c["run"]["seed"]) != ("sft", 0.5, 43)]
    cells = [c for c in cells if (c["method"], c["run"]["p"]) != ("average", 0.0)]
    told = absent(make_frame([*cells, make_cell("sft", n=90)]))
    assert told == [
        "Tiny.gguf, reviews, topic devices, n = 90: every row: not seed 43, 44",
        "Tiny.gguf, reviews, topic devices, n = 800: naive average at p = 0: no seed",
        "Tiny.gguf, reviews, topic devices, n = 800: SFT (undefended) at p = 0.5: not seed 43",
    ]
