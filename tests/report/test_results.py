"""The table of cells: its order, intervals, differences and tests, held against SciPy and hand-made counts."""

import json
import math
import pathlib

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from br_jax.core.errors import UserError
from br_jax.report.results import (
    absent,
    by_setting,
    estimate,
    find,
    gap,
    one_a,
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
    (small, alone), (setting, group) = by_setting(results_of([make_cell("aligned", n=90, harmful=99), *cells[::-1]]))
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
    cells = [make_cell("sft", scores={"suite": mine}), make_cell("aligned", scores={"suite": theirs})]
    sft, aligned = (find(results_of(cells), 0.1, method) for method in ("sft", "aligned"))
    assert (gap(sft, aligned, "harmful") is not None) == (paired(sft, aligned, "harmful") is not None) == compared


def test_an_estimate_is_of_what_was_measured_and_without_a_spread_one_seeds_own(row):
    expected = binomtest(7, 100).proportion_ci(method="wilson")
    for counts in ({1: 7}, {1: 7, 2: 7, 3: 7}):
        found = estimate(row("sft", "harmful", counts), "harmful")
        assert found[:3] == pytest.approx((0.07, expected.low, expected.high), abs=1e-5)
        assert (len(found.by_seed), found.own) == (len(counts), True)
    found = estimate(row("sft", "prompts", {1: 100, 2: 20, 3: 0}, harmful=0), "harmful")
    assert found.high == Score(0, 20).interval[1] and [*found.by_seed] == [1, 2]
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
    parts_of_one = make_cell("sft", scores={"outcomes": {"task": [0.5] * 200}})
    assert paired(results_of([parts_of_one]), results_of([make_cell("aligned")]), "task") is None


def test_one_a_is_a_qr_and_the_one_with_most_cells(make_grid, make_cell):
    few = [make_cell("ours", a, p=0.1, seed=s) for a, s in ((0.1, 1), (1.0, 1), (1.0, 2), (0.0, 1), (0.0, 2), (0.0, 3))]
    for cells, chosen in ((few, 1.0), (make_grid(a=(1.0, 0.5, 0.0)), 0.5), (few[3:], 0.0)):
        assert {*one_a(results_of(cells)).a.dropna()} == {chosen}


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
        (lambda cell: cell.update(run=3), "is not iterable|unsupported operand"),
        (lambda cell: cell["run"].pop("p"), "lacks 'p'"),
        (lambda cell: cell["run"].update(p="0.1"), "multiply"),
        (lambda cell: cell["run"].update(n="many"), "as an integer"),
        (lambda cell: cell["run"].update(task="\ud800"), "surrogates"),
        (lambda cell: cell["run"].update(user=["harsh"]), "list found"),
        (lambda cell: cell["scores"].update(harmful={"k": 3, "n": 2}), "k = 3 successes of n = 2"),
        (lambda cell: cell["scores"].update(harmful_by_topic=[1]), "'items'"),
        (lambda cell: cell.update(recipe=["one"]), "not enough values"),
    ],
)
def test_a_damaged_cell_is_named_in_one_line(make_cell, write_cells, damage, message):
    cell = json.loads(json.dumps(make_cell("sft")))
    damage(cell)
    said = rf"cells/sft\.json: no finished cell, or a damaged one \([^\n]*({message})[^\n]*\): delete it and run"
    with pytest.raises(UserError, match=said):
        read_cells(write_cells([cell]))


def test_an_archive_gives_back_its_cells(tmp_path, make_grid):
    """Outcomes are bits, margins have three digits."""
    tables = {"one": make_grid(seeds=(1, 2)), "other": make_grid(methods=("sft", "ours"), ps=(0.5,), seeds=(3,))}
    lines = []
    for table, cell in ((table, cell) for table, cells in tables.items() for cell in cells):
        outcomes = cell["scores"]["outcomes"] = {**cell["scores"]["outcomes"], "margin_harmful": [0.125, -3.0]}
        outcomes["margin_benign"] = []
        scores = {name: value for name, value in cell["scores"].items() if name != "outcomes"}
        line = {"table": table, **cell["run"], "method": cell["method"], "a": cell["a"], "seconds": 1.0}
        lines.append(line | {"recipe": "null", "scores": json.dumps(scores)})
        for name, values in outcomes.items():
            packed = np.array(values, np.float16) if "margin" in name else np.packbits(np.array(values, bool))
            lines[-1] |= {f"{name}_n": len(values), f"{name}_outcomes": packed.tobytes()}
    pd.DataFrame(lines).to_parquet(tmp_path / "cells.parquet")
    for table, cells in tables.items():
        expected = [{name: cell[name] for name in cell if name != "settings"} | {"seconds": 1.0} for cell in cells]
        assert read_archive(tmp_path / "cells.parquet", table) == expected
    with pytest.raises(UserError, match="unknown table 'on'; near: one"):
        read_archive(tmp_path / "cells.parquet", "on")


def test_the_results_in_the_repository_make_tables():
    file = pathlib.Path(__file__).parents[2] / "results" / "cells.parquet"
    results = results_of(read_archive(file, "ours"))
    ours = results[(results.method == "ours") & (results.p == 0.5) & (results.task == "reviews")]
    assert len(ours) and ours.HS.max() < 0.2 < results[results.method == "sft"].HS.max()
