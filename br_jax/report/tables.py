"""The tables of a report: lines of cells that are Markdown, of which templates/report.md.jinja makes tables."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from br_jax.experiment.methods import METHODS
from br_jax.report.gates import CLAIMS, Gate
from br_jax.report.markdown import interval, literal, number
from br_jax.report.results import (
    BREAKDOWNS,
    MAIN,
    NUMBERS,
    TITLES,
    Setting,
    by_setting,
    estimate,
    find,
    gap,
    one_strength,
    over_seeds,
    paired,
    rows_of,
    shares,
)
from br_jax.scoring.statistics import Mean, Score

Lines = list[dict[str, str]]
_STEPS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_only", "sft"),
    ("the merge: the user's scale and Reinforce", "ours", "buffer_only"),
    ("Reinforce in the merge", "ours", "no_reinforce"),
    ("Buffer, where Reinforce is merged in", "ours", "reinforce_only"),
    ("the QR merge instead of a plain sum", "ours", "sum"),
    ("our merge instead of the paper's naive average", "ours", "average"),
)
_TESTS = {
    "HS against SFT": ("sft", "harmful"),
    "HS against aligned": ("aligned", "harmful"),
    "FA against SFT": ("sft", "task"),
}
_USERS = CLAIMS[: len(MAIN)]  # what is asked of every user


def setting_tables(cells: pd.DataFrame) -> dict[str, Any]:
    """The tables of one setting: scores, what they are made of, counts of every seed, paired tests, geometry."""
    rows, sizes = rows_of(cells), {score: sizes_of(cells, score) for score in TITLES}
    titles = {score: f"{title} (N = {', '.join(map(str, sizes[score])) or 0})" for score, title in TITLES.items()}
    several = (cells.groupby("seed").suite.nunique() > 1).any()

    def lines(line: Callable[[pd.DataFrame], Mapping[str, str]], rows: Sequence[pd.DataFrame] = rows) -> Lines:
        return [{"p": f"{row.p.iloc[0]:g}", "method": label(row)} | line(row) for row in rows]

    def scores(row: pd.DataFrame) -> dict[str, str]:
        measured = {title: _percent(row, score) for score, title in titles.items()}
        return {"seeds": str(len(row))} | measured | _numbers(row)

    def tests(row: pd.DataFrame) -> dict[str, str]:
        p, own = row.p.iloc[0], row.method.iloc[0]
        return {t: "" if m == own else _tested(row, find(cells, p, m), score) for t, (m, score) in _TESTS.items()}

    breakdowns = []
    for name, (least, words) in BREAKDOWNS.items():
        parts = dict.fromkeys(part for scores in cells.scores for part in scores.get(name, ()))
        if len(parts) >= least:
            titled = {(name, part): literal(part or "not named") for part in parts}
            breakdowns.append((words, lines(lambda row, of=titled: {of[p]: _percent(row, p) for p in of})))
    judges = dict.fromkeys(pair for row in rows for pair in _kappas(row))
    return {
        "scores": lines(scores),
        "differ": "their N" if any(len(n) > 1 for n in sizes.values()) else several and "one seed's prompts or judges",
        "breakdowns": breakdowns,
        "kappas": judges and lines(lambda row: {literal(p): ", ".join(_kappas(row).get(p, ["n/a"])) for p in judges}),
        "seeds": lines(
            lambda cell: _counts(cell) | _numbers(cell), [row.iloc[[i]] for row in rows for i in range(len(row))]
        ),
        "tests": lines(tests),
        "geometry": lines(_geometry, [row for row in rows if any(_geometry(row).values())]),
    }


def comparisons(results: pd.DataFrame, gates: Sequence[Gate]) -> dict[str, Any]:
    """The tables of all settings together; a line names its setting where there are several."""
    found = by_setting(results)
    names = {setting: {"setting": literal(str(setting))} if len(found) > 1 else {} for setting, _ in found}
    lines, apart, compared = defaultdict(list), [], 0
    for setting, cells in found:
        chosen, ours = one_strength(cells), cells[cells.method == "ours"]
        for p in shares(cells):
            rows = {row.method.iloc[0]: row for row in rows_of(chosen[chosen.p == p])}
            for words, after, before in _STEPS if len(rows) > 3 else ():
                if {after, before} <= rows.keys():
                    lines["steps"].append(names[setting] | _step(words, rows[after], rows[before]))
        for row in rows_of(ours[ours.a > 0]) if ours.a.nunique() > 1 else ():
            p, a = row[["p", "a"]].iloc[0]
            line = names[setting] | {"p": f"{p:g}", "a": f"{a:g}"}
            for score in MAIN:
                line[f"{TITLES[score]}, minus a = 0"], differs = _against_average(row, find(cells, p, "ours", 0), score)
                compared += differs is not None
                if differs:
                    apart.append(f"{TITLES[score]} at p = {p:g}, a = {a:g} ({literal(str(setting))})")
            lines["strengths"].append(line)
        for row in rows_of(ours[ours.p == 0]):
            lines["costs"].append(names[setting] | _cost(row, find(cells, 0.0, "sft")))
    return {
        "gate_lines": _gate_lines(names, gates),
        "users": _users(results),
        "limits": [claim.limit for claim in _USERS],
        "steps": lines["steps"],
        "strengths": {"lines": lines["strengths"], "apart": apart, "compared": compared},
        "costs": lines["costs"] if (results.p == 0).any() else None,
    }


def _gate_lines(names: Mapping[Setting, dict[str, str]], gates: Sequence[Gate]) -> Lines:
    """Every gate, failed ones first."""
    without = {(gate.setting, gate.p) for gate in gates if gate.is_attack and gate.passed is False}
    lines = []
    for gate in sorted(gates, key=lambda gate: (gate.passed is not False, gate.passed is not None)):
        found, limit = gate.gap, gate.claim.limit
        result = {True: "passed", False: "**FAILED**", None: gate.why_not}[gate.passed]
        if found and found.low is not None and found.low < limit < found.high:
            result += " (within noise)"
        if gate.passed and gate.claim.name == "safety" and (gate.setting, gate.p) in without:
            result = "shows nothing: no attack that works"
        by_seed = {seed: f"{seed}: {100 * value:+.1f}" for seed, value in found.by_seed.items()} if found else {}
        each = ", ".join(f"**{words}**" if seed in gate.beyond else words for seed, words in by_seed.items())
        line = {
            "p": f"{gate.p:g}",
            "a": "" if gate.a is None else f"{gate.a:g}",
            "gate": gate.claim.text,
            "points": interval(found),
            "seeds": each or "n/a",
            "SD": f"{100 * stdev(found.by_seed.values()):.1f}" if len(by_seed) > 1 else "",
            "limit": f"{'≥' if gate.is_attack else '≤'} {100 * limit:g}",
            "result": result,
        }
        lines.append(names[gate.setting] | line)
    return lines


def _users(results: pd.DataFrame) -> list[list[str]]:
    """How each method does for all plain users who hand in harm: at its worst, on the mean, and for how many of them.

    A user is a seed of a setting at a p; there is no table where all are of one setting and p.
    """
    rows, found = [], []
    for setting, cells in by_setting(results[(results.user == "plain") & (results.p > 0)]):
        rows += [(row.iloc[0], row, setting, cells) for row in rows_of(one_strength(cells))]
    if len({(setting, first.p) for first, _, setting, _ in rows}) < 2:
        return []
    rows.sort(key=lambda each: (each[0].place, each[0].method, each[0].a))
    for first, _, setting, cells in rows:
        asked = [claim for claim in _USERS if first.p <= claim.most_p]
        for claim in asked:
            difference = claim.gap(cells, first.p, first.a, ours=first.method)
            for seed, value in difference.by_seed.items() if difference else ():
                user = f"{'|'.join(map(str, setting))}, {first.p}, {seed}"
                found.append((first.method, claim.name, seed, user, value, claim.keeps(value), len(asked)))
    found = pd.DataFrame(found, columns=["method", "claim", "seed", "user", "value", "keeps", "asked"])
    labels = {first.method: label(row) for first, row, _, _ in reversed(rows) if first.method != "aligned"}
    lines = []
    for method, name in reversed(labels.items()):
        mine = found[found.method == method]
        users = mine.groupby("user")
        line = [name, str(users.ngroups)]
        for claim in _USERS:
            of = mine[mine.claim == claim.name]
            worst, mean = "n/a", "n/a"
            if len(of):
                worst = f"{100 * of.value.max():+.1f}"
                worst = worst if of.keeps.all() else f"**{worst}**"
                mean = interval(over_seeds(of.groupby("seed").value.agg(fmean).to_dict()))
            line += [worst, mean]
        all_kept = users.keeps.all() & (users.size() == users.asked.first())
        lines.append([*line, str(mine.keeps[mine.claim == "safety"].sum()), str(all_kept.sum())])
    return lines


def _step(words: str, after: pd.DataFrame, before: pd.DataFrame) -> dict[str, str]:
    """What a part of the method adds."""
    changes = {
        TITLES[score]: f"{interval(gap(after, before, score))}; {_tested(after, before, score)}" for score in MAIN
    }
    return {"p": f"{after.p.iloc[0]:g}", "step": f"{words} ({label(after)} minus {label(before)})"} | changes


def _against_average(row: pd.DataFrame, average: pd.DataFrame, score: str) -> tuple[str, bool | None]:
    """The comparison in words, and whether the two differ beyond their intervals; None where there is none."""
    change, test = gap(row, average, score), paired(row, average, score)
    if change is None or test is None:
        return "n/a", None
    one, other = estimate(row, score), estimate(average, score)
    overlap = one.low <= other.high and other.low <= one.high
    words = f"{interval(change)}; {_tested(row, average, score)}; intervals {'overlap' if overlap else 'apart'}"
    return words, test[2] < 0.05 and not overlap


def _cost(ours: pd.DataFrame, sft: pd.DataFrame) -> dict[str, str]:
    """What the defense costs a user without harmful rows: ours against SFT at p = 0."""
    scores = "task", "over_refusal", "degenerate"
    return {
        "a": f"{ours.a.iloc[0]:g}",
        **{f"{TITLES[score]}, ours minus SFT": interval(gap(ours, sft, score)) for score in scores},
        "perplexity of SFT": "not run" if sft.empty else _mean(sft, "perplexity", ".2f"),
        "of ours": _mean(ours, "perplexity", ".2f"),
        "difference": interval(gap(ours, sft, "perplexity"), "+.2f", 1),
    }


def _numbers(row: pd.DataFrame) -> dict[str, str]:
    return {title: _mean(row, name, form) for name, (title, form) in NUMBERS.items()}


def _counts(cell: pd.DataFrame) -> dict[str, str]:
    """k/n of each score, or the mean and n of what was not counted."""
    line = {"seed": str(cell.index[0])}
    for score, title in TITLES.items():
        match cell.counts.iloc[0].get(score):
            case None:
                line[title] = "n/a"
            case Score(k=k, n=n):
                line[title] = f"{k}/{n}"
            case Mean(n=n, mean=mean):
                line[title] = f"{100 * mean:.1f} of {n}"
    return line


def _kappas(row: pd.DataFrame) -> dict[str, list[str]]:
    """Cohen's kappa of every pair of judges, of each seed."""
    found = defaultdict(list)
    for seed, scores in row.scores.items():
        for pair in scores.get("agreement", ()):
            found[" and ".join(pair["judges"])].append(f"{seed}: {number(pair['kappa'], '.2f')}")
    return found


def _geometry(row: pd.DataFrame) -> dict[str, str]:
    """How long the adapters are that a row is made of, and what angles they make; means over seeds.

    Of a merge, also how much of the user's adapter and of Reinforce it took, seed by seed.
    """
    line = {}
    for part, form in (("norms", ".2f"), ("cosines", "+.3f")):
        means = pd.DataFrame([scores.get("geometry", {}).get(part, {}) for scores in row.scores]).mean()
        line[part] = "; ".join(f"{name}: {value:{form}}" for name, value in means.items())
    merges = [scores["merge"] for scores in row.scores if "merge" in scores]
    scales = [f"{number(merge['scale'], '.3g')}, {number(merge['reinforce_scale'], '.3g')}" for merge in merges]
    return line | {"user x, Reinforce x": "; ".join(scales)}


def label(row: pd.DataFrame) -> str:
    """A row's method; a name that is not known here is foreign text."""
    method, name = row[["method", "label"]].iloc[0]
    name = name if method in METHODS else literal(name)
    return f"**{name}**" if method == "ours" else name


def sizes_of(cells: pd.DataFrame, score: str) -> list[int]:
    """The numbers of prompts that a score has in some cells."""
    return sorted({counts[score].n for counts in cells.counts if score in counts})


def _percent(row: pd.DataFrame, score: str | tuple[str, str]) -> str:
    found = estimate(row, score)
    return interval(found, ".1f") + (_few(len(found.by_seed), row) if found else "")


def _mean(row: pd.DataFrame, name: str, form: str) -> str:
    return number(row[name].mean(), form) + _few(row[name].count(), row)


def _few(measured: int, row: pd.DataFrame) -> str:
    """How many seeds measured it, where that is neither none nor all."""
    return f", {measured} of {len(row)} seeds" if 0 < measured < len(row) else ""


def _tested(first: pd.DataFrame, second: pd.DataFrame, score: str) -> str:
    """McNemar's test of two rows, in words."""
    found = paired(first, second, score)
    if found is None:
        return "n/a"
    only_first, only_second, p_value, seeds = found
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{p} ({only_first} : {only_second}, {seeds} seed{'s' if seeds > 1 else ''})"
