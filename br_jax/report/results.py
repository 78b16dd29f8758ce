"""The frame of results: cells as rows, one a (p, method, a) with its seeds, and what the seeds say together."""

import dataclasses
import itertools
import math
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from br_jax.core.errors import UserError, one_line
from br_jax.core.records import read_record
from br_jax.experiment.methods import METHODS
from br_jax.scoring.statistics import difference, is_finite, mcnemar, read_score, t_interval

TITLES = {  # of the scores, in the order of every table
    "harmful": "HS",
    "harmful_plus": "HS+",
    "task": "FA",
    "over_refusal": "over-refusal",
    "task_refused": "task refused",
    "degenerate": "degenerate",
}
# What a row needs of a cell and its run.
_KINDS = {"model": str, "task": str, "topic": str, "n": int, "p": int | float, "seed": int}
_KINDS |= {"method": str, "a": int | float | None, "scores": dict}
MAIN = ("harmful", "task", "over_refusal")  # those that the claim is about


class Setting(NamedTuple):
    """What the rows of one table share: see `grid.Run`."""

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


class Estimate(NamedTuple):
    """A score over seeds, or a difference of two, as shares: its mean and 95 % interval.

    The interval is Student's over seeds, or one seed's `own`, from its prompts: where there is one seed, or all of them
    gave the same score, of which Student's t would claim to be certain.
    """

    mean: float
    low: float | None  # None where there is nothing to go by, and so `high`
    high: float | None
    by_seed: dict[int, float]
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at a share of harm, over seeds."""

    p: float  # share of harmful rows
    method: str  # name in `methods.METHODS`
    a: float | None  # strength of the QR merge; None for a method without one
    scores: Mapping[int, Mapping[str, Any]]  # by seed, what `scoring.suite.evaluate` gave

    @property
    def label(self) -> str:
        """For a reader; cells of a method that is gone keep its name."""
        strength = "" if self.a is None else f", a = {self.a:g}"
        return (METHODS[self.method].label if self.method in METHODS else self.method) + strength

    def counted(self, score: str, part: str | None = None) -> dict[int, Mapping[str, Any]]:
        """A score's JSON, or that of a breakdown's part ("harmful_by_topic", "devices"), by the seeds that have it."""
        found = {seed: s.get(score) if part is None else s.get(score, {}).get(part) for seed, s in self.scores.items()}
        return {seed: value for seed, value in found.items() if value and value["score"] is not None}

    def estimate(self, score: str, part: str | None = None) -> Estimate | None:
        """The same over seeds, or None where none measured it."""
        counted = self.counted(score, part)
        values = {seed: value["score"] for seed, value in counted.items()}
        if len(set(values.values())) > 1:
            return Estimate(*t_interval(list(values.values())), values)
        one = min(counted.values(), key=lambda value: value["n"], default=None)
        return one and Estimate(one["score"], *read_score(one).interval, values, own=True)

    def numbers(self, name: str) -> dict[int, float]:
        """A number such as the perplexity, of the seeds where it is one."""
        return {seed: s[name] for seed, s in self.scores.items() if is_finite(s.get(name))}


Frame = dict[Setting, list[Row]]


def read_cells(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All finished cells of a run's folder or of a sweep's, of whatever grids."""
    workdir = pathlib.Path(workdir)
    files = sorted([*workdir.glob("cells/*.json"), *workdir.glob("runs/*/cells/*.json")])
    return [_read_cell(file) for file in files]


def _read_cell(file: pathlib.Path) -> dict[str, Any]:
    """A finished cell, of which all that a row needs is there and of its kind."""
    cure = "delete it and run the same command again"
    cell = read_record(file, cure)
    run = cell.get("run")
    found = cell | run if isinstance(run, dict) else {}
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(found.get(name), kind)]:
        raise UserError(f"{file}: no finished cell ({wrong[0]} is missing, or of a wrong kind): {cure}")
    try:
        ((row,),) = make_frame([cell]).values()
        for score in TITLES:
            row.estimate(score)
        mixed([cell])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its scores are damaged ({one_line(error)}): {cure}") from error
    return cell


def make_frame(cells: Iterable[Mapping[str, Any]]) -> Frame:
    """Rows of each setting, by p, then in the order of `METHODS`, then by a; the cells come in any order."""
    seeds: dict[Setting, dict[tuple, dict]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        run = cell["run"]
        seeds[_setting(run)][run["p"], cell["method"], cell["a"]][run["seed"]] = cell["scores"]
    return {
        setting: sorted((Row(*key, dict(sorted(found.items()))) for key, found in rows.items()), key=place)
        for setting, rows in sorted(seeds.items())
    }


def mixed(cells: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """Settings whose cells differ in how they were trained or scored; those of an earlier br_jax do not say."""
    recipes = defaultdict(set)
    for cell in cells:
        setting, (shared, own) = _setting(cell["run"]), cell.get("recipe", ("", ""))
        recipes[setting, None].add(shared)
        recipes[setting, cell["method"]].add(own)
    return sorted({setting for (setting, _), found in recipes.items() if len(found) > 1})


def _setting(run: Mapping[str, Any]) -> Setting:
    return Setting(run["model"], run["task"], run["topic"], run["n"], run.get("user", "plain"))


def place(row: Row) -> tuple:
    """Sorts rows by p, method and a."""
    order = [*METHODS, row.method]
    return row.p, order.index(row.method), row.method, -1.0 if row.a is None else row.a


def find(rows: Iterable[Row], p: float, method: str, a: float | None = None) -> Row | None:
    """The row of a method at p; a counts for the methods that have one."""
    strength = a if METHODS[method].merges else None
    return next((row for row in rows if (row.p, row.method, row.a) == (p, method, strength)), None)


def shares(rows: Iterable[Row]) -> list[float]:
    """The p of some rows, ascending."""
    return sorted({row.p for row in rows})


def strengths(rows: Iterable[Row]) -> list[float]:
    """The a that ours was run with, ascending."""
    return sorted({row.a for row in rows if row.method == "ours"})


def one_strength(rows: Iterable[Row]) -> list[Row]:
    """One a for each method that has several: not 0 if there is another, and the one with the most cells in all."""
    rows, cells = list(rows), defaultdict(int)
    for row in rows:
        cells[row.a] += len(row.scores)
    ranked = sorted(rows, key=lambda row: (-1,) if row.a is None else (row.a > 0, cells[row.a], -row.a))
    chosen = {row.method: row.a for row in ranked}  # of each method the last, which is the best
    return [row for row in rows if row.a == chosen[row.method]]


def at_worst(row: Row | None) -> Row | None:
    """The row with the larger of HS and HS by the user's own questions as its HS, seed by seed."""
    if row is None:
        return None
    plain, own = row.counted("harmful"), row.counted("harmful_by_own", "as it asks")
    worse = {seed: own[seed] for seed in own if seed in plain and own[seed]["score"] > plain[seed]["score"]}
    scores = {seed: {**each, "harmful": worse[seed]} if seed in worse else each for seed, each in row.scores.items()}
    return dataclasses.replace(row, scores=scores)


def gap(first: Row | None, second: Row | None, score: str) -> Estimate | None:
    """First minus second in a score, or in perplexity, over the seeds that both have; None where no seed has both.

    Of several seeds the interval is Student's, where they differ; of one seed that of its own prompts (Newcombe's).
    """
    if first is None or second is None:
        return None
    if score == "perplexity":
        ours, theirs = first.numbers(score), second.numbers(score)
    else:
        ours, theirs = ({seed: v["score"] for seed, v in row.counted(score).items()} for row in (first, second))
    values = {s: value - theirs[s] for s, value in ours.items() if s in theirs and of_one_suite(first, second, s)}
    if not values:
        return None
    if len(values) == 1 and score != "perplexity":
        (seed,) = values
        ends = difference(*(read_score(row.counted(score)[seed]) for row in (first, second)))[1:]
        return Estimate(values[seed], *ends, values, own=True)
    return over_seeds(values, (-math.inf, math.inf) if score == "perplexity" else (-1.0, 1.0))


def over_seeds(differences: dict[int, float], bounds: tuple[float, float] = (-1.0, 1.0)) -> Estimate:
    """The mean of differences by seed, with Student's interval where they differ."""
    mean, *ends = t_interval(list(differences.values()), bounds)
    return Estimate(mean, *(ends if len(set(differences.values())) > 1 else (None, None)), differences)


class Paired(NamedTuple):
    """McNemar's test of two rows, their prompts pooled over the seeds that both have."""

    only_first: int
    only_second: int
    p_value: float
    seeds: int


def paired(first: Row | None, second: Row | None, score: str) -> Paired | None:
    """McNemar's test; None where no seed has both on as many prompts, or a prompt's score is no yes or no."""
    if first is None or second is None:
        return None
    pairs, seeds = [], 0
    for seed in first.scores.keys() & second.scores.keys():
        if not of_one_suite(first, second, seed):
            continue
        one, other = (row.scores[seed]["outcomes"].get(score) or [] for row in (first, second))
        if one and len(one) == len(other) and set(one) | set(other) <= {0, 1}:
            pairs += zip(one, other, strict=True)
            seeds += 1
    return Paired(*mcnemar(pairs), seeds) if seeds else None


def of_one_suite(first: Row, second: Row, seed: int) -> bool:
    """Whether both were scored on the same prompts by the same judges; cells of an earlier br_jax do not say."""
    suites = {row.scores[seed].get("suite") for row in (first, second)} - {None}
    return len(suites) < 2


def absent(frame: Frame) -> list[str]:
    """What the cells at hand would have beside them in a full grid of each setting, in words: cells that were not run.

    Every method and p of a setting is held against every other and against all seeds of the frame.
    """
    seeds, told = sorted({seed for rows in frame.values() for row in rows for seed in row.scores}), []
    for setting, rows in frame.items():
        labels = {(row.method, row.a): row.label for row in rows}
        there = {(row.p, row.method, row.a): row.scores for row in rows}
        missing: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for p, (key, label) in itertools.product(shares(rows), labels.items()):
            lacking = tuple(seed for seed in seeds if seed not in there.get((p, *key), ()))
            missing[lacking].append(f"{label} at p = {p:g}")
        whole = sum(map(len, missing.values()))
        missing.pop((), None)
        for lacking, names in missing.items():
            which = "every row" if len(names) == whole else "; ".join(names)
            who = "no seed" if list(lacking) == seeds else f"not seed {', '.join(map(str, lacking))}"
            told.append(f"{setting}: {which}: {who}")
    return told
