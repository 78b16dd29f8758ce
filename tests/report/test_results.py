"""The table of cells: its order, intervals, differences and tests, held against SciPy and hand-made counts."""

import json
import math
import pathlib

import numpy as np
import pytest
from scipy.stats import binomtest

from br_jax.core.errors import UserError
from br_jax.report.results import (
    absent,
    by_setting,
    estimate,
    find,
    gap,
    one_strength,
    pack_cells,
    paired,
    read_archive,
    read_cells,
    results_of,
)
from br_jax.scoring.statistics import Score, difference


@pytest.fixture
def row(make_cell):
    """row(method, field, {seed: value}, a, ...) -> cells that differ by seed in one field of `make_cell`."""

    def make(method, field, by_seed, a=None, **same):
        return results_of(make_cell(method, a, seed=s, **{field: value}, **same) for s, value in by_seed.items())

    return make


def test_lines_are_in_order_whatever_order_the_cells_are_in(make_grid, make_cell):
    cells = [*make_grid(a=(1.0, 0.0)), make_cell("aligned", n=90), make_cell("later", p=0.1)]
    results = results_of([make_cell("aligned", n=90, harmful=99), *cells[::-1]])
    (small, alone), (setting, group) = by_setting(results)
    assert (small.n, setting) == (90, ("models/Tiny.gguf", "reviews", "devices", 800, "plain"))
    assert alone.HS.tolist() == [0.02], "of two cells of one place the last counts"
    at = group[(group.p == 0.1) & (group.index == 42)]
    names = ["aligned", "sft", "buffer_only", "reinforce_only", "reinforce_only", "average", "ours", "ours", "later"]
    assert at.method.tolist() == names
    np.testing.assert_array_equal(at.a, [np.nan, np.nan, np.nan, 0, 1, np.nan, 0, 1, np.nan])
    assert group.p.is_monotonic_increasing and find(group, 0.1, "ours", 1.0).index.tolist() == [42, 43, 44]


@pytest.mark.parametrize("mine, theirs, compared", [("a", "a", True), ("a", "b", False), (None, "b", True)])
def test_cells_of_other_prompts_are_not_compared(make_cell, mine, theirs, compared):
    """Such as those that are left of another split; of cells that do not say it is not known."""
    cells = [make_cell("sft", harmful=80), make_cell("aligned", harmful=5)]
    for cell, suite in zip(cells, (mine, theirs), strict=True):
        cell["scores"] |= {"suite": suite} if suite else {}
    sft, aligned = (find(results_of(cells), 0.1, method) for method in ("sft", "aligned"))
    assert (gap(sft, aligned, "harmful") is not None) == (paired(sft, aligned, "harmful") is not None) == compared


def test_without_a_spread_an_estimate_is_one_seeds_own_and_of_the_smaller_sample(row):
    expected = binomtest(7, 100).proportion_ci(method="wilson")
    for counts in ({1: 7}, {1: 7, 2: 7, 3: 7}):
        found = estimate(row("sft", "harmful", counts), "harmful")
        assert found[:3] == pytest.approx((0.07, expected.low, expected.high), abs=1e-5)
        assert (len(found.by_seed), found.own) == (len(counts), True)
    found = estimate(row("sft", "prompts", {1: 100, 2: 20}, harmful=0), "harmful")
    assert found.high == Score(0, 20).interval[1]


def test_what_was_not_measured_does_not_count(row):
    assert list(estimate(row("sft", "prompts", {1: 0, 2: 100}, harmful=0), "harmful").by_seed) == [2]
    assert estimate(row("sft", "prompts", {1: 0}, harmful=0), "harmful") is None
    values = dict(enumerate((math.nan, None, 4.0, math.inf)))
    assert row("sft", "perplexity", values).perplexity.dropna().to_dict() == {2: 4.0}


def test_a_gap_is_over_the_seeds_that_both_have(row):
    first = row("sft", "harmful", {1: 80, 2: 90, 3: 99})
    found = gap(first, row("aligned", "harmful", {2: 10, 3: 5, 4: 50}), "harmful")
    assert found.by_seed == pytest.approx({2: 0.80, 3: 0.94})
    # Two seeds: t = 12.706 at one degree of freedom, clipped at 1.
    assert found[:3] == pytest.approx((0.87, 0.87 - 12.7062 * 0.07, 1.0), abs=1e-5)
    assert gap(first, first[:0], "harmful") is gap(first, row("aligned", "harmful", {9: 1}), "harmful") is None
    one = gap(first, row("aligned", "harmful", {1: 0}), "harmful")
    assert one.own and one[:3] == difference(Score(80, 100), Score(0, 100)), "the interval of its own prompts"
    first = row("ours", "perplexity", dict(enumerate((9.0, 12.0, math.nan))), 0.1)
    found = gap(first, row("sft", "perplexity", dict.fromkeys(range(3), 4.0)), "perplexity")
    assert found.by_seed == {0: 5.0, 1: 8.0} and found.mean == 6.5 and found.high > 20, "perplexity is not clipped"


def test_pairs_are_the_same_prompts_of_the_same_seeds(make_cell, row):
    first = row("ours", "begin", {1: 0, 2: 4, 3: 0}, 0.1, harmful=6)
    # Seed 1 agrees; in seed 2 prompts 6 to 9 are the first's alone and 0 to 3 the second's.
    assert paired(first, row("sft", "harmful", {1: 6, 2: 6, 9: 6}), "harmful") == (4, 4, 1.0, 2)
    assert paired(first, row("sft", "prompts", {1: 99}, harmful=0), "harmful") is None
    assert paired(first, first[:0], "harmful") is None
    cell = make_cell("sft")
    cell["scores"]["outcomes"]["task"] = [0.5] * 200  # no yes or no
    assert paired(results_of([cell]), results_of([make_cell("aligned")]), "task") is None


def test_one_a_is_a_qr_and_the_one_with_most_cells(make_grid, make_cell):
    few = [make_cell("ours", a, p=0.1, seed=s) for a, s in ((0.1, 1), (1.0, 1), (1.0, 2), (0.0, 1), (0.0, 2), (0.0, 3))]
    assert {*one_strength(results_of(few)).a} == {1.0}
    assert {*one_strength(results_of(make_grid(a=(1.0, 0.5, 0.0)))).a.dropna()} == {0.5}
    assert {*one_strength(results_of(few[3:])).a} == {0.0}


def test_what_is_absent_is_said(make_grid, make_cell):
    assert absent(results_of(make_grid())) == []
    gone = {("sft", 0.5, 43), *(("average", 0.0, seed) for seed in (42, 43, 44))}
    cells = [c for c in make_grid() if (c["method"], c["run"]["p"], c["run"]["seed"]) not in gone]
    assert absent(results_of([*cells, make_cell("sft", n=90)])) == [
        "Tiny.gguf, reviews, topic devices, n = 90: every row: not seed 43, 44",
        "Tiny.gguf, reviews, topic devices, n = 800: naive average at p = 0: no seed",
        "Tiny.gguf, reviews, topic devices, n = 800: SFT (undefended) at p = 0.5: not seed 43",
    ]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda cell: cell["run"].pop("p"), "p is missing, or of a wrong kind"),
        (lambda cell: cell["run"].update(task="\ud800"), "its scores are damaged"),
        (lambda cell: cell["run"].update(user=["harsh"]), "its scores are damaged"),
        (lambda cell: cell["scores"].update(harmful={"k": 3, "n": 2}), "its scores are damaged"),
        (lambda cell: cell["scores"].update(harmful_by_topic=[1]), "its scores are damaged"),
        (lambda cell: cell.update(recipe=["one"]), "its scores are damaged"),
    ],
)
def test_a_damaged_cell_is_named_in_one_line(make_cell, write_cells, damage, message):
    cell = json.loads(json.dumps(make_cell("sft")))
    damage(cell)
    with pytest.raises(UserError, match=rf"cells/sft\.json: .*{message}[^\n]*delete it and run"):
        read_cells(write_cells([cell]))


def test_an_archive_gives_back_its_cells(tmp_path, make_grid):
    """But for examples of answers; a margin has three digits."""
    tables = {"one": make_grid(seeds=(1, 2)), "other": make_grid(methods=("sft", "ours"), ps=(0.5,), seeds=(3,))}
    for cell in (cell for cells in tables.values() for cell in cells):
        cell["run"].setdefault("user", "plain")
    tables["one"][0]["scores"]["outcomes"]["margin_harmful"] = [0.125, -3.0]
    pack_cells(tables).to_parquet(tmp_path / "cells.parquet")
    for table, cells in tables.items():
        for cell, found in zip(cells, read_archive(tmp_path / "cells.parquet", table), strict=True):
            outcomes = {name: values for name, values in found["scores"]["outcomes"].items() if values}
            assert outcomes == cell["scores"]["outcomes"]
            cell["scores"] = {k: v for k, v in cell["scores"].items() if k not in ("outcomes", "examples")}
            del found["scores"]["outcomes"], found["seconds"]
            assert found == {name: cell[name] for name in found}
    with pytest.raises(UserError, match="unknown table 'on'; near: one"):
        read_archive(tmp_path / "cells.parquet", "on")


def test_the_results_in_the_repository_make_tables():
    file = pathlib.Path(__file__).parents[2] / "results" / "cells.parquet"
    results = results_of(read_archive(file, "ours"))
    ours = results[(results.method == "ours") & (results.p == 0.5) & (results.task == "reviews")]
    assert len(ours) and ours.HS.max() < 0.2 < results[results.method == "sft"].HS.max()
