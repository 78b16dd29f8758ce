"""The table of cells: its order, what its samples are, which cells are compared, and what is no cell."""

import contextlib
import json
import math
import pathlib
import re

import numpy as np
import pytest

from br_jax.core.errors import UserError
from br_jax.experiment.protocol import MARKS, Ledger
from br_jax.report.results import (
    WORST,
    absent,
    by_group,
    by_setting,
    estimate,
    find,
    gap,
    one_a,
    pooled,
    read_archive,
    read_cells,
    results_of,
    shares_of,
    write_archive,
)
from br_jax.scoring import statistics
from br_jax.scoring.statistics import Sample, difference

ALIKE = ["ask/1"] * 60 + ["ask/2"] * 140


@pytest.fixture
def row(make_cell):
    """row(method, field, {seed: value}, a, ...) -> cells that differ by seed in one field of `make_cell`."""

    def make(method, field, by_seed, a=None, **same):
        return results_of(make_cell(method, a, seed=s, **{field: value}, **same) for s, value in by_seed.items())

    return make


def sample(by_seed, groups=None, n=200):
    """Where the first k of n count, in every seed."""
    return Sample.join([Sample.of([i < k for i in range(n)], groups, seed) for seed, k in by_seed.items()])


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
    assert (gap(sft, aligned, "harmful") is not None) == (pooled([(sft, aligned)], "harmful") is not None) == compared


def test_an_estimate_is_of_all_prompts_of_the_seeds_that_measured_it(row, make_cell):
    counts = {1: 7, 2: 60, 3: 100}
    alike = row("sft", "harmful", counts)
    for scores in alike.scores:
        scores["groups"] = scores["groups"] | {"topic": ALIKE}
    assert estimate(alike, "harmful") == statistics.estimate(sample(counts, ALIKE))
    assert by_group(alike, "harmful").to_dict("list") == {"k": [7 + 60 + 60, 40], "n": [180, 420]}
    found = estimate(row("sft", "prompts", {1: 100, 2: 20, 3: 0}, harmful=0), "harmful")
    assert (found.n, found.groups, [*found.by_seed]) == (120, 100, [1, 2])
    assert estimate(row("sft", "prompts", {1: 0}, harmful=0), "harmful") is None
    values = dict(enumerate((math.nan, None, 4.0, math.inf)))
    assert row("sft", "perplexity", values).perplexity.dropna().to_dict() == {2: 4.0}
    by_topic = {"harmful_by_topic": {"devices": {"n": 9, "score": 0.2}, "potions": {"n": 0, "score": None}}}
    assert shares_of(row("sft", "harmful", counts, scores=by_topic), "harmful_by_topic") == {"devices": [0.2] * 3}


def test_the_worst_is_of_each_seed_s_worse_questions(row):
    """Of seed 1 the user's own, of seed 2 the plain ones."""
    own = {"harmful_own": [i < 60 for i in range(200)]}
    table = row("sft", "harmful", {1: 7, 2: 90}, outcomes=own)
    groups = table.scores.iloc[0]["groups"]["topic"]
    assert estimate(table, WORST) == statistics.estimate(sample({1: 60, 2: 90}, groups))
    assert table[WORST].tolist() == [0.3, 0.45] and table.HS.tolist() == [0.035, 0.45]


def test_a_gap_is_over_the_seeds_and_trainings_that_both_have(row, make_cell):
    first, groups = row("sft", "harmful", {1: 160, 2: 180, 3: 199}), [f"devices: {i}" for i in range(200)]
    found = gap(first, row("aligned", "harmful", {2: 20, 3: 10, 4: 50}), "harmful")
    assert found == difference(sample({2: 180, 3: 199}, groups), sample({2: 20, 3: 10}, groups))
    assert gap(first, first[:0], "harmful") is gap(first, row("aligned", "harmful", {9: 1}), "harmful") is None
    # Two trainings of a seed: its second is compared with the second, as prompts of one seed.
    again = [results_of(make_cell("sft", seed=1, repeat=r, harmful=k) for r, k in each)
             for each in (((1, 30), (2, 90)), ((2, 50), (3, 0)))]  # fmt: skip
    assert gap(*again, "harmful") == difference(sample({1: 90}, groups), sample({1: 50}, groups))
    assert estimate(again[0], "harmful").by_seed == {1: 0.3}
    # All prompts of several pairs together.
    pairs = [(first, row("aligned", "harmful", {1: 4})), (first, row("aligned", "harmful", {2: 8}))]
    assert pooled(pairs, "harmful").by_seed == pytest.approx({1: 0.78, 2: 0.86})
    assert pooled([], "harmful") is pooled([(first, first[:0])], "harmful") is None


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
        (lambda cell: cell["scores"].update(harmful={"k": 3, "n": 2, "score": 1}), "harmful: n is not the number"),
        (lambda cell: cell["scores"]["groups"].pop("ordinary"), "lacks 'ordinary'"),
        (lambda cell: cell["scores"]["outcomes"]["harmful"].pop(), "harmful: not n outcomes"),
        (lambda cell: cell["scores"]["outcomes"].update(harmful=[7] * 200), "harmful: not n outcomes"),
        (lambda cell: cell["scores"].update(groups={}, outcomes={}), "lacks 'topic'"),
        (lambda cell: cell.update(scores={"task": {"k": 9, "n": 3, "score": 1}}), "task: k = 9 of n = 3"),
        (lambda cell: cell["scores"].update(harmful_by_topic=[1]), "'items'"),
        (lambda cell: cell.update(recipe=["one"]), "not enough values"),
        (lambda cell: cell.update(made=3), "not a mapping"),
    ],
)
def test_a_damaged_cell_is_named_in_one_line(make_cell, write_cells, damage, message):
    cell = json.loads(json.dumps(make_cell("sft")))
    damage(cell)
    said = rf"cells/sft\.json: no finished cell, or a damaged one \([^\n]*({message})[^\n]*\): delete it and run"
    with pytest.raises(UserError, match=said):
        read_cells(write_cells([cell]))


@pytest.mark.parametrize(("seed", "made", "said"), [(100, {"judge": "b"}, "another judge (b)"), (100, {}, ""),
    (100, None, "another code (not said)"), (99, {"judge": "b"}, ""), (99, None, "")])  # fmt: skip
def test_cells_of_test_seeds_are_made_as_the_ledger_says(make_cell, write_cells, seed, made, said):
    """Of other seeds they may be made in any way."""
    first = dict.fromkeys(MARKS, "a") | {"commit": "c0ffee"}
    own = {} if made is None else {"made": first | made}
    folder = write_cells([make_cell("sft", seed=101) | {"made": first}, make_cell("sft", seed=seed) | own])
    Ledger(folder).add(folder / "runs" / "run000" / "cells" / "sft.json", first)
    match = rf"run001/cells/sft\.json: made with {re.escape(said)} than[^\n]*$"
    with pytest.raises(UserError, match=match) if said else contextlib.nullcontext():
        assert len(read_cells(folder)) == 2


def test_cells_of_an_earlier_br_jax_have_prompts_that_are_not_alike(make_cell):
    """They say what counted, and before that how many: whose differences are of unrelated prompts."""
    cells, told = [make_cell(m, seed=s, harmful=k) for m, k in (("sft", 160), ("aligned", 9)) for s in (1, 2)], []
    for gone in ("groups", "outcomes"):
        for cell in cells:
            del cell["scores"][gone]
        sft, aligned = results_of(cells[:2]), results_of(cells[2:])
        told.append((estimate(sft, "harmful"), gap(sft, aligned, "harmful")))
    (which, apart), (many, unrelated) = told
    assert which == many and which.groups == which.n == 400
    assert apart.mean == unrelated.mean == 0.755 and apart.variance < unrelated.variance


def test_an_archive_gives_back_its_cells(tmp_path, make_grid):
    file = tmp_path / "cells.parquet"
    tables = {"one": make_grid(seeds=(1, 2)), "other": make_grid(methods=("sft", "ours"), ps=(0.5,), seeds=(3,))}
    for cell in tables["one"]:
        cell["scores"]["examples"] = [{"prompt": "a", "answer": "b"}]
    for table in ("one", "other", "one"):
        write_archive(file, table, tables[table])
    for table, cells in tables.items():
        for cell in cells:
            cell["scores"].pop("examples", None)
        assert read_archive(file, table) == json.loads(json.dumps(cells))
    with pytest.raises(UserError, match="unknown table 'on'; near: one"):
        read_archive(file, "on")


def test_the_results_in_the_repository_make_tables():
    file = pathlib.Path(__file__).parents[2] / "results" / "cells.parquet"
    results = results_of(read_archive(file, "ours"))
    ours = results[(results.method == "ours") & (results.p == 0.5) & (results.task == "reviews")]
    assert len(ours) and ours.HS.max() < 0.2 < results[results.method == "sft"].HS.max()
