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

import pandas as pd

from br_jax.core.errors import UserError, look_up, one_line
from br_jax.core.io import write_bytes
from br_jax.core.records import read_record
from br_jax.experiment import protocol
from br_jax.experiment.methods import METHODS
from br_jax.scoring.statistics import Estimate, Sample, difference, is_finite
from br_jax.scoring.statistics import estimate as estimate_of
from br_jax.scoring.suite import PARTS_OF

TITLES = {"harmful": "HS", "harmful_plus": "HS+", "task": "FA"}  # of the scores, in the order of every table
TITLES |= {"over_refusal": "over-refusal", "borderline": "borderline refused", "task_refused": "task refused"}
TITLES |= {"off_topic": "off topic", "degenerate": "degenerate"}
MAIN = ("harmful", "task", "over_refusal")  # those that the claim is about
WORST = "harmful_worst"  # the larger of HS and HS by the user's own questions
_OWN = "harmful_own"
NUMBERS = {"perplexity": ("perplexity", ".2f"), "mean_words": ("words", ".1f")}  # title and format
NUMBERS |= {f"margin_{kind}": (f"margin, {kind}", "+.2f") for kind in ("harmful", "benign")}
PARTS = {  # of HS: from how many parts on they are shown, and in what words
    "harmful_by_topic": (2, "HS by topic"),
    "harmful_by_judge": (2, "HS by judge; the first is the one that is meant elsewhere"),
    "harmful_by_attack": (1, "Stored attack prompts that got what they are after, by method"),
}
_MOST = 1_000_000  # prompts of a score
CURE = "delete it and run the same command again, in a new folder where its seed is a test seed"


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
# the method's own; shares and numbers, NaN where they were not measured; scores: as `scoring.suite.evaluate` gave them.
COLUMNS = [*_SETTING, "p", "method", "a", "label", "seed", "repeat", "place", "suite", "recipe", "own_recipe"]
COLUMNS += [*TITLES.values(), WORST, *NUMBERS, "scores"]


def read_cells(
    workdir: str | os.PathLike, known: Mapping[pathlib.Path, Mapping[str, Any]] = MappingProxyType({})
) -> list[Mapping[str, Any]]:
    """All finished cells of a run's folder or of a sweep's, of whatever grids.

    A `UserError` where one is damaged, or of a test seed and made otherwise than the others (see `protocol`).

    What `known` has is not read.
    """
    workdir, cells = pathlib.Path(workdir), []
    ledger = protocol.Ledger(workdir)
    for file in sorted([*workdir.glob("cells/*.json"), *workdir.glob("runs/*/cells/*.json")]):
        cells.append(known[file] if file in known else read_record(file, CURE))
        try:
            _line(cells[-1])
            made = {**cells[-1].get("made", {})}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{file}: no finished cell, or a damaged one ({what}): {CURE}") from error
        if protocol.role(cells[-1]["run"]["seed"]) == "test":
            ledger.require(file, made, there=True)
    return cells


def read_archive(file: str | os.PathLike, table: str) -> list[dict[str, Any]]:
    """The cells of one table of a file such as results/cells.parquet, without their examples of answers."""
    frame = pd.read_parquet(file, columns=["table", "cell"])
    look_up("table", table, dict.fromkeys(frame["table"]))
    return [*map(json.loads, frame["cell"][frame["table"] == table])]


def write_archive(file: str | os.PathLike, table: str, cells: Iterable[Mapping[str, Any]]) -> None:
    """Puts cells into such a file as a table of it, in the place of one of that name."""
    lines = []
    for cell in cells:
        scores = {name: value for name, value in cell["scores"].items() if name != "examples"}
        text = json.dumps({**cell, "scores": scores}, separators=(",", ":"))
        lines.append({"table": table, **cell["run"], "method": cell["method"], "a": cell["a"], "cell": text})
    frame = pd.DataFrame(lines)
    if os.path.exists(file):
        others = pd.read_parquet(file)
        frame = pd.concat([others[others["table"] != table], frame])
    write_bytes(file, frame.to_parquet(compression="brotli", index=False))


def results_of(cells: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of cells in any order: `COLUMNS`, by seed, sorted by setting, p, method (as `METHODS`), a and seed."""
    table = pd.DataFrame(map(_line, cells), columns=COLUMNS)
    table = table.drop_duplicates([*_SETTING, "p", "method", "label", "seed", "repeat"], keep="last")
    order = [*_SETTING, "p", "place", "method", "a", "seed", "repeat"]
    return table.sort_values(order, na_position="first").set_index("seed")


def _line(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's line of the table; raises an error of any kind where something is missing or no such value."""
    run, method, a, scores = {"user": "plain"} | cell["run"], cell["method"], cell["a"], cell["scores"]
    shares = {name: float(scores[name]["score"]) for name in (*TITLES, _OWN) if (scores.get(name) or {"n": 0})["n"]}
    for name in shares:
        _require_outcomes(scores, name)
    for name in PARTS:
        _parts(scores, name)
    recipe, own_recipe = map(str, cell.get("recipe", ("", "")))
    known = METHODS[method].label if method in METHODS else method  # cells of a method that is gone keep its name
    line = {name: run[name] for name in _SETTING} | {"p": 1.0 * run["p"]}
    line |= {name: operator.index(({"repeat": 1} | run)[name]) for name in ("n", "seed", "repeat")}
    line |= {"method": method, "a": math.nan if a is None else float(a)}  # a: strength of the QR merge
    line |= {"label": known if a is None else f"{known}, a = {a:g}", "place": [*METHODS, method].index(method)}
    "".join(line[name] for name in ("model", "task", "topic", "user", "label")).encode()  # text, no half a surrogate
    return line | {
        "suite": None if scores.get("suite") is None else str(scores["suite"]),
        **{"recipe": recipe, "own_recipe": own_recipe, "scores": scores},
        **{TITLES[name]: share for name, share in shares.items() if name in TITLES},
        **({WORST: max(shares["harmful"], shares.get(_OWN, 0.0))} if "harmful" in shares else {}),
        **{name: float(scores[name]) for name in NUMBERS if is_finite(scores.get(name))},
    }


def _require_outcomes(scores: Mapping[str, Any], name: str) -> None:
    """Raises a `ValueError` where a score is not what its outcomes come to."""
    n, outcomes = operator.index(scores[name]["n"]), (scores.get("outcomes") or {}).get(name)
    groups = [group for part in PARTS_OF[name] for group in scores["groups"][part]] if "groups" in scores else None
    if groups is not None and not (len(groups) == n and all(isinstance(group, str) for group in groups)):
        raise ValueError(f"{name}: n is not the number of its groups, or one is no text")
    if groups is not None or outcomes:
        if len(outcomes) != n or not all(0 <= value <= 1 for value in outcomes):
            raise ValueError(f"{name}: not n outcomes in [0, 1]")
    elif not 0 <= operator.index(scores[name]["k"]) <= n <= _MOST:
        raise ValueError(f"{name}: k = {scores[name]['k']} of n = {n} prompts")


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


def estimate(row: pd.DataFrame, score: str) -> Estimate | None:
    """A score of a row over its seeds, or None where none measured it."""
    return estimate_of(_sample(row.scores, score))


def gap(first: pd.DataFrame, second: pd.DataFrame, score: str) -> Estimate | None:
    """First minus second in a score over the seeds that both have; None where no seed has both."""
    return pooled([(first, second)], score)


def pooled(pairs: Iterable[tuple[pd.DataFrame, pd.DataFrame]], score: str) -> Estimate | None:
    """The first of each pair of rows minus the second in a score, all prompts of all pairs together.

    Of those seeds alone that both have, whose cells were scored on the same prompts by the same judges as far as they
    say.
    """
    samples = [], []
    for first, second in pairs:
        both = first.reset_index().merge(second.reset_index(), on=["seed", "repeat"]).set_index("seed")
        same = both[(both.suite_x == both.suite_y) | both.suite_x.isna() | both.suite_y.isna()]
        for each, scores in zip(samples, (same.scores_x, same.scores_y), strict=True):
            each.append(_sample(scores, score))
    return difference(*map(Sample.join, samples)) if samples[0] else None


def shares_of(row: pd.DataFrame, breakdown: str) -> dict[str, list[float]]:
    """Of each part of a breakdown its share, of each seed that has it."""
    found = defaultdict(list)
    for part, share in (each for scores in row.scores for each in _parts(scores, breakdown).items()):
        found[part].append(share)
    return found


def _parts(scores: Mapping[str, Any], breakdown: str) -> dict[str, float]:
    """Of each part of a breakdown its share, of those that were measured."""
    return {part: float(each["score"]) for part, each in (scores.get(breakdown) or {}).items() if each["n"]}


def by_group(row: pd.DataFrame, score: str) -> pd.DataFrame:
    """Of each group of prompts (a phrasing, a kind) how many counted, k, of how many, n, over the seeds of a row."""
    sample = _sample(row.scores, score)
    outcomes = pd.DataFrame({"group": [*sample.groups], "outcome": sample.values})
    return outcomes.groupby("group", sort=False).outcome.agg(k="sum", n="count")


def _sample(cells: pd.Series, score: str) -> Sample:
    """What each prompt gave, in the cells of a row, their scores by seed."""
    parts = []
    for seed, scores in cells.items():
        name = score
        if score == WORST:
            own, plain = (scores.get(which) or {"n": 0} for which in (_OWN, "harmful"))
            name = _OWN if own["n"] and own["score"] > plain["score"] else "harmful"
        counted, outcomes = scores.get(name) or {"n": 0}, (scores.get("outcomes") or {}).get(name)
        if counted["n"] and outcomes:
            groups = [group for part in PARTS_OF[name] for group in (scores.get("groups") or {}).get(part, ())]
            parts.append(Sample.of(outcomes, groups or [f"{seed}/{i}" for i in range(len(outcomes))], seed))
        elif counted["n"]:  # of an earlier br_jax: how many, and not which
            k, n = int(counted["k"]), int(counted["n"])
            parts.append(Sample.of([1] * k + [0] * (n - k), [(id(scores), name, i) for i in range(n)], seed))
    return Sample.join(parts) if parts else Sample.of([])


def are_grouped(cells: pd.DataFrame) -> bool:
    """Whether some cells say what their prompts have in common; those of an earlier br_jax do not."""
    return any("groups" in scores for scores in cells.scores)


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
