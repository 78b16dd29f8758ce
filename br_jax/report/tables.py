"""The tables of a report: lines of cells that are Markdown, of which templates/report.md.jinja makes tables."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from br_jax.report.gates import CLAIMS, Gate
from br_jax.report.markdown import interval, literal, number
from br_jax.report.results import MAIN, NUMBERS, PARTS, TITLES, estimate, find, gap, one_a, over_seeds, paired, rows_of
from br_jax.scoring.statistics import Score

_STEPS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_only", "sft"),
    ("the merge: the user's scale and Reinforce", "ours", "buffer_only"),
    ("Reinforce in the merge", "ours", "no_reinforce"),
    ("Buffer, where Reinforce is merged in", "ours", "reinforce_only"),
    ("the QR merge instead of a plain sum", "ours", "sum"),
    ("our merge instead of the paper's naive average", "ours", "average"),
)
_TESTS = (("harmful", "sft"), ("harmful", "aligned"), ("task", "sft"))  # score, and the method to test against
_USERS = CLAIMS[: len(MAIN)]  # what is asked of every user


def setting_tables(cells: pd.DataFrame) -> dict[str, Any]:
    """The tables of one setting: scores, what they are made of, counts of every seed, paired tests, geometry."""
    rows, sizes = rows_of(cells), sizes_of(cells)
    numbers = {name: title for name, (title, _) in NUMBERS.items()}
    titles = {score: f"{title} (N = {', '.join(map(str, sizes[title])) or 0})" for score, title in TITLES.items()}
    several = (cells.groupby("seed").suite.nunique() > 1).any()

    def lines(line: Callable[[pd.DataFrame], Mapping[str, str]], rows: Sequence = rows) -> list[dict[str, str]]:
        return [{"p": f"{p:g}", "method": label} | line(row) for (p, _, label), row in rows]

    def values(row: pd.DataFrame, titles: Mapping[Any, str]) -> dict[str, str]:
        return {title: _value(row, score) for score, title in titles.items()}

    def counts(cell: pd.DataFrame) -> dict[str, str]:
        found = {title: cell.counts.iloc[0].get(score) for score, title in TITLES.items()}
        told = {title: f"{x.k}/{x.n}" if isinstance(x, Score) else f"{100 * x.mean:.1f} of {x.n}" if x else "n/a"
                for title, x in found.items()}  # fmt: skip
        return {"seed": str(cell.index[0])} | told | values(cell, numbers)

    def tests(row: pd.DataFrame) -> dict[str, str]:
        p, own = row[["p", "method"]].iloc[0]
        words = ["" if other == own else _tested(row, find(cells, p, other), score) for score, other in _TESTS]
        return dict(zip(("HS against SFT", "HS against aligned", "FA against SFT"), words, strict=True))

    breakdowns = []
    for name, (least, words) in PARTS.items():
        parts = dict.fromkeys(part for scores in cells.scores for part in scores.get(name, ()))
        if len(parts) >= least:
            titled = {(name, part): literal(part or "not named") for part in parts}
            breakdowns.append((words, lines(partial(values, titles=titled))))
    judges = dict.fromkeys(pair for _, row in rows for pair in _kappas(row))
    return {
        "scores": lines(lambda row: {"seeds": str(len(row))} | values(row, titles | numbers)),
        "differ": "their N" if any(len(n) > 1 for n in sizes.values()) else several and "one seed's prompts or judges",
        "breakdowns": breakdowns,
        "kappas": judges and lines(lambda row: {literal(p): ", ".join(_kappas(row).get(p, ["n/a"])) for p in judges}),
        "seeds": lines(counts, [(key, row.iloc[[i]]) for key, row in rows for i in range(len(row))]),
        "tests": lines(tests),
        "geometry": lines(_geometry, [(key, row) for key, row in rows if any(_geometry(row).values())]),
    }


def comparisons(settings: Mapping, gates: Sequence[Gate]) -> dict[str, Any]:
    """The tables of all settings together; a line names its setting where there are several."""
    names = {setting: {"setting": literal(str(setting))} if len(settings) > 1 else {} for setting in settings}
    lines, apart, compared = defaultdict(list), [], 0
    for setting, cells in settings.items():
        ours = cells[cells.method == "ours"]
        for p, at_p in one_a(cells).groupby("p"):
            rows = {method: row for (_, method, _), row in rows_of(at_p)}
            for words, *methods in _STEPS if len(rows) > 3 else ():
                if {*methods} <= rows.keys():
                    after, before = pair = [rows[method] for method in methods]
                    words += f" ({after.label.iloc[0]} minus {before.label.iloc[0]})"
                    step = {TITLES[score]: f"{interval(gap(*pair, score))}; {_tested(*pair, score)}" for score in MAIN}
                    lines["steps"].append(names[setting] | {"p": f"{p:g}", "step": words} | step)
        for (p, *_), row in rows_of(ours[ours.a > 0]) if ours.a.nunique() > 1 else ():
            average, at = find(cells, p, "ours", 0), f"p = {p:g}, a = {row.a.iloc[0]:g}"
            line = names[setting] | {"p": f"{p:g}", "a": f"{row.a.iloc[0]:g}"}
            for score in MAIN:
                change, test, words = gap(row, average, score), paired(row, average, score), "n/a"
                if change and test:
                    compared += 1
                    one, other = estimate(row, score), estimate(average, score)
                    overlap = one.low <= other.high and other.low <= one.high
                    words = f"{interval(change)}; {_tested(row, average, score)}; "
                    words += f"intervals {'overlap' if overlap else 'apart'}"
                    if test[2] < 0.05 and not overlap:
                        apart.append(f"{TITLES[score]} at {at} ({literal(str(setting))})")
                line[f"{TITLES[score]}, minus a = 0"] = words
            lines["strengths"].append(line)
        sft = find(cells, 0.0, "sft")
        for _, row in rows_of(ours[ours.p == 0]):
            cost = {f"{TITLES[score]}, ours minus SFT": interval(gap(row, sft, score))
                    for score in ("task", "over_refusal", "degenerate")}  # fmt: skip
            cost |= {"perplexity of SFT": "not run" if sft.empty else _value(sft, "perplexity")}
            cost |= {"of ours": _value(row, "perplexity")}
            cost |= {"difference": interval(gap(row, sft, "perplexity"), "+.2f", 1)}
            lines["costs"].append(names[setting] | {"a": f"{row.a.iloc[0]:g}"} | cost)
    found = {"gate_lines": [names[gate.setting] | line for gate, line in _gate_lines(gates)], "users": _users(settings)}
    found |= {"limits": [claim.limit for claim in _USERS], "steps": lines["steps"]}
    found |= {"strengths": {"lines": lines["strengths"], "apart": apart, "compared": compared}}
    return found | {"costs": lines["costs"] if any((cells.p == 0).any() for cells in settings.values()) else None}


def _gate_lines(gates: Sequence[Gate]) -> list[tuple[Gate, dict[str, str]]]:
    """Every gate, failed ones first."""
    without, lines = {(gate.setting, gate.p) for gate in gates if gate.claim.is_attack and gate.passed is False}, []
    for gate in sorted(gates, key=lambda gate: (gate.passed is not False, gate.passed is not None)):
        found, limit, by_seed = gate.gap, gate.claim.limit, gate.gap.by_seed if gate.gap else {}
        result = {True: "passed", False: "**FAILED**", None: gate.why_not}[gate.passed]
        if found and found.low is not None and found.low < limit < found.high:
            result += " (within noise)"
        if gate.passed and gate.claim.name == "safety" and (gate.setting, gate.p) in without:
            result = "shows nothing: no attack that works"
        each = [f"{seed}: {100 * value:+.1f}" for seed, value in by_seed.items()]
        each = [f"**{words}**" if seed in gate.beyond else words for seed, words in zip(by_seed, each, strict=True)]
        line = {"p": f"{gate.p:g}", "a": "" if gate.a is None else f"{gate.a:g}", "gate": gate.claim.text}
        line |= {"points": interval(found), "seeds": ", ".join(each) or "n/a"}
        line |= {"SD": f"{100 * stdev(by_seed.values()):.1f}" if len(by_seed) > 1 else ""}
        line |= {"limit": f"{'≥' if gate.claim.is_attack else '≤'} {100 * limit:g}", "result": result}
        lines.append((gate, line))
    return lines


def _users(settings: Mapping) -> list[list[str]]:
    """How each method does for all plain users who hand in harm; nothing where all are of one setting and p."""
    found, asked_of = [], set()
    harmed = {setting: cells[(cells.user == "plain") & (cells.p > 0)] for setting, cells in settings.items()}
    for setting, cells in harmed.items():
        for (p, method, label), row in rows_of(one_a(cells)):
            asked_of.add((setting, p))
            asked = [claim for claim in _USERS if p <= claim.most_p]
            line = {**row[["place", "a"]].iloc[0], "method": method, "label": label, "asked": len(asked)}
            found.append(line)  # with no claim, so that there is one of every method
            for claim in asked:
                difference = claim.gap(cells, p, line["a"], ours=method)
                for seed, value in difference.by_seed.items() if difference else ():
                    user = {"claim": claim.name, "seed": seed, "user": f"{tuple(setting)}, {p}, {seed}"}
                    found.append(line | user | {"value": value, "keeps": claim.keeps(value)})
    if len(asked_of) < 2:
        return []
    columns = ["place", "method", "a", "label", "asked", "claim", "seed", "user", "value", "keeps"]
    found, lines = pd.DataFrame(found, columns=columns).sort_values(columns[:3], kind="stable"), []
    for _, mine in found[found.method != "aligned"].groupby("method", sort=False):
        users = mine.groupby("user")
        lines.append([mine.label.iloc[0], str(users.ngroups)])
        for claim in _USERS:
            of = mine[mine.claim == claim.name]
            bold = "" if of.keeps.all() else "**"
            mean = over_seeds(of.groupby("seed").value.agg(fmean).to_dict()) if len(of) else None
            lines[-1] += [f"{bold}{100 * of.value.max():+.1f}{bold}" if len(of) else "n/a", interval(mean)]
        all_kept = users.keeps.all() & (users.size() == users.asked.first())
        lines[-1] += [str(sum(mine.keeps[mine.claim == "safety"])), str(sum(all_kept))]
    return lines


def _kappas(row: pd.DataFrame) -> dict[str, list[str]]:
    """Cohen's kappa of every pair of judges, of each seed."""
    found = defaultdict(list)
    for seed, scores in row.scores.items():
        for pair in scores.get("agreement", ()):
            found[" and ".join(pair["judges"])].append(f"{seed}: {number(pair['kappa'], '.2f')}")
    return found


def _geometry(row: pd.DataFrame) -> dict[str, str]:
    """Lengths of a row's adapters and angles between them, means over seeds; of a merge, its scales, seed by seed."""
    line = {}
    for part, form in (("norms", ".2f"), ("cosines", "+.3f")):
        means = pd.DataFrame([scores.get("geometry", {}).get(part, {}) for scores in row.scores]).mean()
        line[part] = "; ".join(f"{name}: {value:{form}}" for name, value in means.items())
    merges = [scores["merge"] for scores in row.scores if "merge" in scores]
    scales = [f"{number(merge['scale'], '.3g')}, {number(merge['reinforce_scale'], '.3g')}" for merge in merges]
    return line | {"user x, Reinforce x": "; ".join(scales)}


def sizes_of(cells: pd.DataFrame) -> dict[str, list[int]]:
    """The numbers of prompts that each score has in some cells, by its title."""
    sizes = {score: {counts[score].n for counts in cells.counts if score in counts} for score in TITLES}
    return {TITLES[score]: sorted(each) for score, each in sizes.items()}


def percents(row: pd.DataFrame) -> dict[str, str]:
    """The main scores' means."""
    found = {TITLES[score]: estimate(row, score) for score in MAIN}
    return {title: number(each and each.mean, ".1f", scale=100) for title, each in found.items()}


def _value(row: pd.DataFrame, score: str | tuple[str, str]) -> str:
    """A score in percent or one of `NUMBERS`, over the seeds that measured it; which is said where not all did."""
    if score in NUMBERS:
        measured, words = row[score].count(), number(row[score].mean(), NUMBERS[score][1])
    else:
        found = estimate(row, score)
        measured, words = len(found.by_seed) if found else 0, interval(found, ".1f")
    return words + (f", {measured} of {len(row)} seeds" if 0 < measured < len(row) else "")


def _tested(first: pd.DataFrame, second: pd.DataFrame, score: str) -> str:
    """McNemar's test of two rows, in words."""
    found = paired(first, second, score)
    if found is None:
        return "n/a"
    only_first, only_second, p_value, seeds = found
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{p} ({only_first} : {only_second}, {seeds} seed{'s' if seeds > 1 else ''})"
