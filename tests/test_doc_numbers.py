"""Numbers of the pages that come from cells: each table of theirs is computed again from results/cells.parquet."""

import itertools
import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from br_jax.experiment.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
SCORES = {"HS": "harmful", "HS+": "harmful_plus", "FA": "task", "OR": "over_refusal", "degenerate": "degenerate"}
LABELS = {method.label: name for name, method in METHODS.items()} | {name: name for name in METHODS}
LABELS |= {"SFT": "sft", "aligned base": "aligned", "ours without Reinforce": "no_reinforce"}
LABELS |= {"RESTA, strength 1": "resta", "SafeInstruct, a refusal a row": "safe_instruct"}
LABELS |= {"ours, all of Reinforce": "no_calibration", "SFT and a calibrated Reinforce": "reinforce_only"}
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def cells():
    """A line a cell, with scores in percent, and HS by the attacker's own questions where that is larger."""
    lines = pd.read_parquet(ROOT / "results" / "cells.parquet")
    scores = lines.pop("cell").map(lambda cell: json.loads(cell)["scores"])
    for title, name in SCORES.items():
        lines[title] = scores.map(lambda each, name=name: 100 * each[name]["score"] if name in each else np.nan)
    own = scores.map(lambda each: max([100 * part["score"] for part in each["harmful_by_own"].values()], default=0))
    return lines.assign(worst=np.maximum(lines["HS"], own), a=lines["a"].fillna(0.1))


def by_seed(cells, score, **where):
    """A score of the cells with these columns, by seed."""
    found = cells[np.logical_and.reduce([cells[name] == value for name, value in where.items()])]
    return found.set_index("seed")[score]


def table_below(page, heading, header):
    """The first table behind a heading whose header begins so: its cells, a list of them a line, the header first."""
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(f"\n{heading}") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    names, _, *rows = ([part.strip() for part in row.strip("|").split("|")] for row in rows)
    return [names, *rows]


def assert_numbers(text, expected, digits=1):
    """A page says these numbers, in this order, rounded; bold or not. "-" and "not run" are for those of no cell."""
    said = NUMBER.findall(re.sub(r"(?<!\S)-(?=,|$)", "", text.replace("*", "").replace("(95 %)", "")))
    expected = [value for value in expected if not np.isnan(value)]
    assert len(said) == len(expected), (text, expected)
    np.testing.assert_allclose(np.array(said, float), expected, atol=0.5 * 10**-digits + 1e-6, err_msg=text)


def interval(values):
    """Student's 95 % interval of the mean, within what a difference of shares may be."""
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), values.sem())
    return values.mean(), max(low, -100), min(high, 100)


NAMES = {
    **dict.fromkeys(("SFT", "SFT's"), "sft"),
    **dict.fromkeys(("ours", "ours'"), "ours"),
    **dict.fromkeys(("without Reinforce", "that without Reinforce"), "no_reinforce"),
    **dict.fromkeys(("SFT + Reinforce alone", "that of SFT + Reinforce alone"), "reinforce_only"),
    "the aligned base's": "aligned",
    "Buffer only": "buffer_only",
    "SFT with the paper's loss (a mean over tokens),": "sft_paper",
    "the recipe's": "paper",
    "its": "no_calibration",
}
GAP = re.compile(r"(HS|FA|OR|degenerate)(?: answers)?(?: of)? ?(.*?) ?minus (.*?)(?: \(.*)?$")
PARTS = {  # of the table: what changes from there on
    "harsh user": {"table": "ours-harsh"},
    "the paper's recipe": {"table": "ours", "method": "paper"},
    "all of Reinforce, not calibrated": {"method": "no_calibration"},
    "AG News": {"task": "ag_news"},
}


def test_the_table_of_todays_recipe(cells):
    where, method, label = {"table": "ours", "task": "reviews", "a": 0.1}, "ours", ""
    names, *rows = table_below("results.md", "## Today's recipe", "| | p |")
    for row in (dict(zip(names, row, strict=True)) for row in rows):
        label = row[""] or label
        bold = re.match(r"\*\*(.*)\*\*: ", label)
        if bold:
            changed = dict(PARTS[bold[1]])
            method, where = changed.pop("method", method), where | changed
        title, first, second = GAP.match(label[bold.end() if bold else 0 :]).groups()
        pair = [
            by_seed(cells, title, p=float(row["p"]), method=name, **where)
            for name in (NAMES[first] if first else method, NAMES[second.strip()])
        ]
        gap = (pair[0] - pair[1]).dropna()
        assert_numbers(" ".join(row[str(seed)] for seed in gap.index), gap)
        assert_numbers(row["mean"].replace(" to", ""), interval(gap))
        assert all(row[str(seed)] == "not run" for seed in {*range(104, 109)} - {*gap.index})


LIMITS = {"HS": 5, "FA": 3, "OR": 5}


def over(cells, title, method, **where):
    """HS and OR over the aligned base's, FA under that of SFT, by seed."""
    found = by_seed(cells, title, method=method, **where)
    if title == "FA":
        return by_seed(cells, title, method="sft", **where) - found
    return found - by_seed(cells, title, method="aligned", **where)


def test_rivals_of_nine_users(cells):
    users = [{"task": task, "p": p} for task, p in (("reviews", 0.5), ("reviews", 0.1), ("ag_news", 0.1))]
    for label, *columns in table_below("defences.md", "## On a real model", "| | HS over")[1:]:
        method, values, columns = LABELS[label.strip("*")], {}, iter(columns)
        for title in LIMITS:
            if (method, title) == ("sft", "FA"):
                assert [next(columns), next(columns)] == ["", ""]
                values[title] = np.zeros((3, 3))
                continue
            gaps = pd.DataFrame([over(cells, title, method, table="rivals", user="plain", **user) for user in users])
            assert gaps.notna().all(axis=None)
            assert_numbers(next(columns), [gaps.max(axis=None)])
            assert_numbers(next(columns).replace(" to", ""), interval(gaps.mean()))
            values[title] = gaps.to_numpy()
        held = {title: values[title] <= limit + 1e-9 for title, limit in LIMITS.items()}
        assert [*map(int, columns)] == [held["HS"].sum(), np.logical_and.reduce([*held.values()]).sum()], label


def test_rivals_at_half_harmful_rows(cells):
    where = {"table": "rivals", "task": "reviews", "p": 0.5, "user": "plain"}
    for label, *columns in table_below("defences.md", "## With half of the rows harmful", "| | HS over")[1:]:
        method = LABELS[label.strip("*")]
        for title, text in zip(("HS", "HS+", "FA", "OR"), columns[:4], strict=True):
            if (method, title) != ("sft", "FA"):
                assert_numbers(text, over(cells, title, method, **where))
        assert_numbers(columns[4], by_seed(cells, "degenerate", method=method, **where))
        if columns[5]:
            harsh = [over(cells, title, method, **where | {"user": "harsh"}).loc[111] for title in LIMITS]
            assert_numbers(columns[5].replace("/", " "), harsh)


def test_attackers(cells):
    (_, *names), *rows = table_below("attackers.md", "## On a real model", "| attacker")
    for user, *columns in rows:
        for name, text in zip(names, columns, strict=True):
            where = {"table": "attackers", "user": user.strip("`"), "method": LABELS[name.strip("`")]}
            assert_numbers(re.sub(r"[()]", "", text), by_seed(cells, "worst", **where), digits=0)
