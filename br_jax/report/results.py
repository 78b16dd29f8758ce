"""Results: one table of finished cells, a line each, and what the seeds of a row say together.

A *row* of a report is a method at a share of harm in one setting; its cells, one a seed, are a part of the table.
"""

import itertools
import json
import math
import operator
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from br_jax.core.errors import UserError, look_up, one_line
from br_jax.core.records import read_record
from br_jax.experiment.methods import METHODS
from br_jax.scoring.statistics import difference, is_finite, mcnemar, read_score, t_interval

TITLES = {"harmful": "HS", "harmful_plus": "HS+", "task": "FA"}  # of the scores, in the order of every table
TITLES |= {"over_refusal": "over-refusal", "task_refused": "task refused", "degenerate": "degenerate"}
MAIN = ("harmful", "task", "over_refusal")  # those that the claim is about
WORST = "harmful_worst"  # the larger of HS and HS by the user's own questions
NUMBERS = {"perplexity": ("perplexity", ".2f"), "mean_words": ("words", ".1f")}  # title and format
NUMBERS |= {f"margin_{kind}": (f"margin, {kind}", "+.2f") for kind in ("harmful", "benign")}
PARTS = {  # of HS: from how many parts on they are shown, and in what words
    "harmful_by_topic": (2, "HS by topic"),
    "harmful_by_judge": (2, "HS by judge; the first is the one that is meant elsewhere"),
    "harmful_by_own": (1, "HS where the questions are put as the attacker puts them"),
    "harmful_by_attack": (1, "Stored attack prompts that got what they are after, by method"),
}
_OUTCOMES = {"harmful": 1, "task": 1, "over_refusal": 1, "margin_harmful": 16, "margin_benign": 16}  # bits a prompt
CURE = "delete it and run the same command again"


class Setting(NamedTuple):
    """What the rows of one table of a report share: see `cells.Run`."""

    model: str
    task: str
    topic: str
    n: int
    user: str = "plain"

    @property
    def model_name(self) -> str:
        """Without the folders that it lies in."""
        return pathlib.Path(self.model).name or "scratch"

    def __str__(self) -> str:
        who = "" if self.user == "plain" else f"user {self.user}, "
        return f"{self.model_name}, {self.task}, {who}topic {self.topic}, n = {self.n}"


_SETTING = [*Setting._fields]
# place: of the method in `METHODS`; suite, recipe, own_recipe: hashes of prompts and judges, of the shared settings, of
# the method's own; shares and numbers, NaN where they were not measured; counts: {score, or (breakdown, part): its
# `Score` or `Mean`}, of those that were measured; scores: as `scoring.suite.evaluate` gave them.
COLUMNS = [*_SETTING, "p", "method", "a", "label", "seed", "place", "suite", "recipe", "own_recipe"]
COLUMNS += [*TITLES.values(), WORST, *NUMBERS, "counts", "scores"]


class Estimate(NamedTuple):
    """A score over seeds, or a difference of two, as shares: its mean and 95 % interval."""

    mean: float
    low: float | None  # Student's over seeds or, where these do not differ, one seed's own; None without either
    high: float | None
    by_seed: dict[int, float]
    own: bool = False  # whether the interval is one seed's, from its prompts


def read_cells(
    workdir: str | os.PathLike, known: Mapping[pathlib.Path, Mapping[str, Any]] = MappingProxyType({})
) -> list[Mapping[str, Any]]:
    """All finished cells of a run's folder or of a sweep's, of whatever grids; a damaged one is a `UserError`.

    What `known` has is not read.
    """
    workdir, cells = pathlib.Path(workdir), []
    for file in sorted([*workdir.glob("cells/*.json"), *workdir.glob("runs/*/cells/*.json")]):
        cells.append(known[file] if file in known else read_record(file, CURE))
        try:
            _line(cells[-1])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{file}: no finished cell, or a damaged one ({what}): {CURE}") from error
    return cells


def read_archive(file: str | os.PathLike, table: str) -> list[dict[str, Any]]:
    """The cells of one table of a file such as results/cells.parquet, without their examples of answers."""
    frame = pd.read_parquet(file)
    look_up("table", table, dict.fromkeys(frame["table"]))
    cells = []
    for line in frame[frame["table"] == table].to_dict("records"):
        outcomes = {}
        for name, bits in _OUTCOMES.items():
            values = np.frombuffer(line[f"{name}_outcomes"], np.uint8 if bits == 1 else np.float16)
            values = np.unpackbits(values, count=line[f"{name}_n"]) if bits == 1 else values.astype(float)
            outcomes[name] = values.tolist()
        cell = {"run": {name: line[name] for name in (*_SETTING, "p", "seed")}, "seconds": line["seconds"]}
        cell |= {"method": line["method"], "a": None if math.isnan(line["a"]) else line["a"]}
        cell |= {"scores": json.loads(line["scores"]) | {"outcomes": outcomes}}
        recipe = json.loads(line["recipe"])
        cells.append(cell | ({"recipe": recipe} if recipe else {}))
    return cells


def results_of(cells: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of cells in any order: `COLUMNS`, by seed, sorted by setting, p, method (as `METHODS`), a and seed."""
    table = pd.DataFrame(map(_line, cells), columns=COLUMNS)
    table = table.drop_duplicates([*_SETTING, "p", "method", "label", "seed"], keep="last")
    return table.sort_values([*_SETTING, "p", "place", "method", "a", "seed"], na_position="first").set_index("seed")


def _line(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's line of the table; raises an error of any kind where something is missing or no such value."""
    run, method, a, scores = {"user": "plain"} | cell["run"], cell["method"], cell["a"], cell["scores"]
    values = {name: scores.get(name) for name in TITLES}
    values |= {(name, part): each for name in PARTS for part, each in (scores.get(name) or {}).items()}
    counts = {name: count for name, value in values.items() if (count := read_score(value)).n}
    if plain := counts.get("harmful"):
        counts[WORST] = max(plain, counts.get(("harmful_by_own", "as it asks"), plain), key=lambda one: one.score)
    recipe, own_recipe = map(str, cell.get("recipe", ("", "")))
    known = METHODS[method].label if method in METHODS else method  # cells of a method that is gone keep its name
    line = {name: run[name] for name in _SETTING} | {"p": 1.0 * run["p"]}
    line |= {name: operator.index(run[name]) for name in ("n", "seed")}
    line |= {"method": method, "a": math.nan if a is None else float(a)}  # a: strength of the QR merge
    line |= {"label": known if a is None else f"{known}, a = {a:g}", "place": [*METHODS, method].index(method)}
    "".join(line[name] for name in ("model", "task", "topic", "user", "label")).encode()  # text, no half a surrogate
    return line | {
        "suite": None if scores.get("suite") is None else str(scores["suite"]),
        **{"recipe": recipe, "own_recipe": own_recipe, "counts": counts, "scores": scores},
        **{TITLES.get(name, name): count.score for name, count in counts.items()},
        **{name: float(scores[name]) for name in NUMBERS if is_finite(scores.get(name))},
    }


def by_setting(results: pd.DataFrame) -> list[tuple[Setting, pd.DataFrame]]:
    """The part of the table of each setting."""
    return [(Setting(*key), cells) for key, cells in results.groupby(_SETTING, sort=False)]


def rows_of(cells: pd.DataFrame) -> list[tuple[tuple[float, str, str], pd.DataFrame]]:
    """The rows of one setting, the cells of each method and a at each p, after their (p, method, label)."""
    return [*cells.groupby(["p", "method", "label"], sort=False)]


def find(cells: pd.DataFrame, p: float, method: str, a: float | None = None) -> pd.DataFrame:
    """The row of a method at p, maybe empty; a counts for the methods that have one."""
    return cells[(cells.p == p) & (cells.method == method) & (cells.a.isna() | (cells.a == a))]


def one_a(cells: pd.DataFrame) -> pd.DataFrame:
    """One a for each method that has several: not 0 if there is another, and the one with the most cells in all."""
    count = cells.a.value_counts()
    ranked = sorted(count.index, key=lambda a: (a == 0, -count[a], a))
    best = {method: min(found.a, key=ranked.index) for method, found in cells.dropna(subset="a").groupby("method")}
    return cells[cells.a.isna() | (cells.a == cells.method.map(best))]


def mixed(results: pd.DataFrame) -> list[Setting]:
    """Settings whose cells differ in how they were trained or scored; those of an earlier br_jax do not say."""
    return [
        setting
        for setting, cells in by_setting(results)
        if cells.recipe.nunique() > 1 or (cells.groupby("method").own_recipe.nunique() > 1).any()
    ]


def estimate(row: pd.DataFrame, score: str | tuple[str, str]) -> Estimate | None:
    """A score, or a (breakdown, part), of a row over its seeds, or None where none measured it."""
    counts = {seed: each[score] for seed, each in row.counts.items() if score in each}
    smallest = min(counts.values(), key=lambda count: count.n, default=None)
    by_seed = {seed: count.score for seed, count in counts.items()}
    return over_seeds(by_seed, (0.0, 1.0), smallest.interval) if smallest else None


def over_seeds(by_seed: dict[int, float], bounds: tuple = (-1.0, 1.0), own: tuple = (None, None)) -> Estimate:
    """The mean of values by seed, with Student's interval where they differ, else with one seed's own."""
    mean, *ends = t_interval([*by_seed.values()], bounds)
    differ = len(set(by_seed.values())) > 1
    return Estimate(mean, *(ends if differ else own), by_seed, own=not differ and own[0] is not None)


def matched(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of two rows of the seeds that both have, on the same prompts by the same judges as far as they say."""
    seeds = first.index.intersection(second.index)
    first, second = first.loc[seeds], second.loc[seeds]
    same = (first.suite == second.suite) | first.suite.isna() | second.suite.isna()
    return first[same], second[same]


def gap(first: pd.DataFrame, second: pd.DataFrame, score: str) -> Estimate | None:
    """First minus second in a score, or in perplexity, over the seeds that both have; None where no seed has both."""
    first, second = matched(first, second)
    column = TITLES.get(score, score)
    by_seed = (first[column] - second[column]).dropna().to_dict()
    if not by_seed:
        return None
    if score in NUMBERS:
        return over_seeds(by_seed, (-math.inf, math.inf))
    seed = next(iter(by_seed))
    own = difference(first.counts[seed][score], second.counts[seed][score])[1:] if len(by_seed) == 1 else (None, None)
    return over_seeds(by_seed, own=own)


def paired(first: pd.DataFrame, second: pd.DataFrame, score: str) -> tuple[int, int, float, int] | None:
    """McNemar's test of two rows, their prompts pooled over the seeds that both have.

    Returns (prompts that only the first counts, only the second, p-value, seeds); None where no seed has both on as
    many prompts, or a prompt's score is no yes or no.
    """
    pairs, seeds = [], 0
    for both in zip(*(row.scores for row in matched(first, second)), strict=True):
        one, other = (scores["outcomes"].get(score) or [] for scores in both)
        if one and len(one) == len(other) and {*one, *other} <= {0, 1}:
            pairs += zip(one, other, strict=True)
            seeds += 1
    return (*mcnemar(pairs), seeds) if seeds else None


def absent(results: pd.DataFrame) -> list[str]:
    """What was not run, in words, if each setting had every of its methods at every p, of all seeds of the table."""
    seeds, lines = {*results.index}, []
    for setting, cells in by_setting(results):
        finished = cells.groupby(["p", "label"]).groups
        missing: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for p, label in itertools.product(cells.p.unique(), cells.label.unique()):
            missing[tuple(sorted(seeds - {*finished.get((p, label), ())}))].append(f"{label} at p = {p:g}")
        all_rows = sum(map(len, missing.values()))
        missing.pop((), None)
        for lacking, names in missing.items():
            which = "every row" if len(names) == all_rows else "; ".join(names)
            who = "no seed" if len(lacking) == len(seeds) else f"not seed {', '.join(map(str, lacking))}"
            lines.append(f"{setting}: {which}: {who}")
    return lines
