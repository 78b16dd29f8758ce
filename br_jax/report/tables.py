"""The tables of a report: lines of cells that are Markdown, of which templates/report.md.jinja makes tables."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from br_jax.report.markdown import interval, literal, number
from br_jax.report.results import (
    MAIN,
    NUMBERS,
    PARTS,
    TITLES,
    are_grouped,
    by_group,
    estimate,
    find,
    gap,
    one_a,
    pooled,
    rows_of,
    shares_of,
)
from br_jax.report.verdicts import CLAIMS, Ruling, Verdict

_STEPS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_only", "sft"),
    ("the merge: the user's scale and Reinforce", "ours", "buffer_only"),
    ("Reinforce in the merge", "ours", "no_reinforce"),
    ("Buffer, where Reinforce is merged in", "ours", "reinforce_only"),
    ("the QR merge instead of a plain sum", "ours", "sum"),
    ("our merge instead of the paper's naive average", "ours", "average"),
)
_AGAINST = (("harmful", "sft"), ("harmful", "aligned"), ("task", "sft"))  # score, and the method it is held against
_ALIKE = {"harmful": "phrasings", "over_refusal": "kinds"}  # scores whose prompts come in groups, and what these are
_USERS = CLAIMS[: len(MAIN)]  # what is asked of every user


def setting_tables(cells: pd.DataFrame) -> dict[str, Any]:
    """The tables of one setting: scores, what they are made of, counts of every seed, differences, geometry."""
    rows, sizes = rows_of(cells), sizes_of(cells)
    numbers = {name: title for name, (title, _) in NUMBERS.items()}
    titles = {score: f"{title} (N = {', '.join(map(str, sizes[title])) or 0})" for score, title in TITLES.items()}
    several = (cells.groupby("seed").suite.nunique() > 1).any()

    def lines(line: Callable[[pd.DataFrame], Mapping[str, str]], rows: Sequence = rows) -> list[dict[str, str]]:
        return [{"p": f"{p:g}", "method": label} | line(row) for (p, _, label), row in rows]

    def values(row: pd.DataFrame, titles: Mapping[Any, str]) -> dict[str, str]:
        return {title: _value(row, score) for score, title in titles.items()}

    def counts(cell: pd.DataFrame) -> dict[str, str]:
        found = {title: cell.scores.iloc[0].get(score) or {"n": 0} for score, title in TITLES.items()}
        told = {title: f"{100 * x['score']:.1f} of {x['n']}" if x["n"] else "n/a" for title, x in found.items()}
        return {"seed": str(cell.index[0])} | told | values(cell, numbers)

    def against(row: pd.DataFrame) -> dict[str, str]:
        p, own = row[["p", "method"]].iloc[0]
        words = ["" if other == own else interval(gap(row, find(cells, p, other), score)) for score, other in _AGAINST]
        return dict(zip(("HS minus SFT's", "HS minus aligned's", "FA minus SFT's"), words, strict=True))

    def alike(row: pd.DataFrame) -> dict[str, str]:
        line = {}
        for score, groups in _ALIKE.items():
            found, shares = estimate(row, score), by_group(row, score)
            line |= {f"{TITLES[score]}: N": str(found.n) if found else "n/a", groups: str(len(shares))}
            line |= {f"design effect ({groups})": number(found and found.design_effect, ".1f")}
            line |= {f"most of one, % ({groups})": number(shares.k.max() / max(shares.k.sum(), 1), ".0f", 100)}
        return line

    breakdowns = []
    for name, (least, words) in PARTS.items():
        parts = dict.fromkeys(part for scores in cells.scores for part in scores.get(name, ()))
        if len(parts) >= least:

            def shares(row: pd.DataFrame, name: str = name, parts: Mapping = parts) -> dict[str, str]:
                found = {part: shares_of(row, name).get(part) for part in parts}
                means = {part: number(each and fmean(each), ".1f", 100) for part, each in found.items()}
                return {literal(part or "not named"): words for part, words in means.items()}

            breakdowns.append((words, lines(shares)))
    judges = dict.fromkeys(pair for _, row in rows for pair in _kappas(row))
    return {
        "scores": lines(lambda row: {"seeds": str(row.index.nunique())} | values(row, titles | numbers)),
        "differ": "their N" if any(len(n) > 1 for n in sizes.values()) else several and "one seed's prompts or judges",
        "breakdowns": breakdowns,
        "kappas": judges and lines(lambda row: {literal(p): ", ".join(_kappas(row).get(p, ["n/a"])) for p in judges}),
        "seeds": lines(counts, [(key, row.iloc[[i]]) for key, row in rows for i in range(len(row))]),
        "against": lines(against),
        "alike": lines(alike) if are_grouped(cells) else [],
        "geometry": lines(_geometry, [(key, row) for key, row in rows if any(_geometry(row).values())]),
    }


def comparisons(settings: Mapping, rulings: Sequence[Ruling]) -> dict[str, Any]:
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
                    step = {TITLES[score]: interval(gap(*pair, score)) for score in MAIN}
                    lines["steps"].append(names[setting] | {"p": f"{p:g}", "step": words} | step)
        for (p, *_), row in rows_of(ours[ours.a > 0]) if ours.a.nunique() > 1 else ():
            average, at = find(cells, p, "ours", 0), f"p = {p:g}, a = {row.a.iloc[0]:g}"
            line = names[setting] | {"p": f"{p:g}", "a": f"{row.a.iloc[0]:g}"}
            for score in MAIN:
                if change := gap(row, average, score):
                    compared += 1
                    if not change.low <= 0 <= change.high:
                        apart.append(f"{TITLES[score]} at {at} ({literal(str(setting))})")
                line[f"{TITLES[score]}, minus a = 0"] = interval(change)
            lines["strengths"].append(line)
        sft = find(cells, 0.0, "sft")
        for _, row in rows_of(ours[ours.p == 0]):
            cost = {f"{TITLES[score]}, ours minus SFT": interval(gap(row, sft, score))
                    for score in ("task", "over_refusal", "degenerate")}  # fmt: skip
            cost |= {"perplexity of SFT": "not run" if sft.empty else _value(sft, "perplexity")}
            cost |= {"of ours": _value(row, "perplexity")}
            change = row.perplexity.groupby("seed").mean() - sft.perplexity.groupby("seed").mean()
            cost |= {"difference": number(change.mean(), "+.2f")}
            lines["costs"].append(names[setting] | {"a": f"{row.a.iloc[0]:g}"} | cost)
    found = {"ruling_lines": [names[ruling.setting] | line for ruling, line in _ruling_lines(rulings)]}
    found |= {"users": _users(settings, rulings), "limits": _USERS, "steps": lines["steps"]}
    found |= {"strengths": {"lines": lines["strengths"], "apart": apart, "compared": compared}}
    return found | {"costs": lines["costs"] if any((cells.p == 0).any() for cells in settings.values()) else None}


def _ruling_lines(rulings: Sequence[Ruling]) -> list[tuple[Ruling, dict[str, str]]]:
    """Every ruling, what is broken or open first."""
    order, lines = [Verdict.BROKEN, Verdict.OPEN, Verdict.NO_ATTACK], []
    for ruling in sorted(rulings, key=lambda each: (*order, each.verdict).index(each.verdict)):
        found, claim = ruling.gap, ruling.claim
        line = {"p": f"{ruling.p:g}", "a": "" if ruling.a is None else f"{ruling.a:g}", "claim": claim.text}
        line |= {"points": interval(found), "limit": f"{'≥' if claim.is_attack else '≤'} {100 * claim.limit:g}"}
        line |= {"verdict": f"**{ruling.verdict}**" if ruling.verdict in order else str(ruling.verdict)}
        each = found.by_seed if found else {}
        line |= {"seeds": ", ".join(f"{seed}: {100 * value:+.1f}" for seed, value in each.items()) or "n/a"}
        line |= {"groups": str(found.groups) if found else "n/a"}
        line |= {"visible": number(found and found.visible, ".1f", 100)}
        line |= {"to settle": "{} groups, {} seeds".format(*ruling.needed) if ruling.needed else ""}
        lines.append((ruling, line))
    return lines


def _users(settings: Mapping, rulings: Sequence[Ruling]) -> list[list[str]]:
    """How each method does for all plain users whose attack works; nothing where there is one setting and p."""
    users = [(each.setting, each.p) for each in rulings if each.claim.is_attack and each.verdict is Verdict.HELD]
    users = [(settings[setting], p) for setting, p in users if setting.user == "plain"]
    if len(users) < 2:
        return []
    rows = [(cells, p, row) for cells, p in users for (at, *_), row in rows_of(one_a(cells)) if at == p]
    labels = {row.method.iloc[0]: (row.place.iloc[0], row.label.iloc[0]) for *_, row in rows}
    lines = []
    for method, (_, label) in sorted(labels.items(), key=lambda each: each[1]):
        mine, line = [each for each in rows if each[2].method.iloc[0] == method], []
        for claim in _USERS if method != "aligned" else ():
            sides = [method if side == "ours" else side for side in (claim.first, claim.second)]
            at = [(cells, p, row.a.iloc[0]) for cells, p, row in mine if p <= claim.most_p]
            pairs = [[find(cells, p, side, a) for side in sides] for cells, p, a in at]
            gaps = [found for pair in pairs if (found := gap(*pair, claim.score))]
            worst = max(gaps, key=lambda found: found.mean, default=None)
            words = f"{interval(worst)}, {claim.verdict(worst)}" if worst else "n/a"
            line += [words, interval(pooled(pairs, claim.score))]
        if line:
            lines.append([label, str(sum(row.index.nunique() for *_, row in mine)), *line])
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
    sizes = {title: {(scores.get(name) or {"n": 0})["n"] for scores in cells.scores} for name, title in TITLES.items()}
    return {title: sorted(each - {0}) for title, each in sizes.items()}


def percents(row: pd.DataFrame) -> dict[str, str]:
    """The main scores' means."""
    found = {TITLES[score]: estimate(row, score) for score in MAIN}
    return {title: number(each and each.mean, ".1f", scale=100) for title, each in found.items()}


def _value(row: pd.DataFrame, score: str) -> str:
    """A score in percent or one of `NUMBERS`, over the seeds that measured it; which is said where not all did."""
    if score in NUMBERS:
        measured, words = row[score].dropna().index.nunique(), number(row[score].mean(), NUMBERS[score][1])
    else:
        found = estimate(row, score)
        measured, words = len(found.by_seed) if found else 0, interval(found, ".1f")
    seeds = row.index.nunique()
    return words + (f", {measured} of {seeds} seeds" if 0 < measured < seeds else "")
