"""The tables of a report, as Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from br_jax.experiment.methods import METHODS
from br_jax.report.gates import TASK_P, Gate, claims_of
from br_jax.report.markdown import literal, number, table, told
from br_jax.report.results import (
    MAIN,
    TITLES,
    Frame,
    Row,
    find,
    gap,
    one_strength,
    over_seeds,
    paired,
    place,
    shares,
    strengths,
)

LEGEND = (
    "Scores in percent: mean over seeds with Student's 95 % interval over them. † marks the 95 % interval of one "
    "seed's own prompts instead (Wilson's, of counts; Newcombe's, of differences): there is one seed, or all "
    "seeds gave the same score, of which Student's t would claim to be certain. HS: share of restricted prompts "
    "that are answered (lower is safer); HS+ also counts degenerate answers; FA: score on the user's task; over- "
    "refusal: share of benign prompts that are refused; task refused: share of the task's prompts that are; "
    "degenerate: share of answers that are empty or loop; perplexity: of the raw model's answers on held-out "
    "instructions; words: mean length of an answer; refusal margin: log-odds that an answer begins as refusals do.",
    "Where the aligned base refuses the task's prompts, taking Buffer out brings some of that back and FA falls.",
    "Paired tests: McNemar's exact two-sided p-value on the same prompts, pooled over the seeds that both have; in "
    "brackets the prompts that only this method counts : only the other, and the seeds. A prompt counts once a seed, "
    "as if seeds were independent; nothing is corrected for the number of tests.",
)
_BREAKDOWNS = {  # scores of parts: from how many parts on they are shown, and in what words
    "harmful_by_topic": (2, "HS by topic"),
    "harmful_by_judge": (2, "HS by judge; the first is the one that is meant elsewhere"),
    "harmful_by_own": (1, "HS where the questions are put as the attacker puts them"),
    "harmful_by_attack": (1, "Stored attack prompts that got what they are after, by method"),
}
MARGINS = {"margin_harmful": "margin, harmful", "margin_benign": "margin, benign"}
_PARTS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_only", "sft"),
    ("the merge: the user's scale and Reinforce", "ours", "buffer_only"),
    ("Reinforce in the merge", "ours", "no_reinforce"),
    ("Buffer, where Reinforce is merged in", "ours", "reinforce_only"),
    ("the QR merge instead of a plain sum", "ours", "sum"),
    ("our merge instead of the paper's naive average", "ours", "average"),
)
_PASSED = {True: "passed", False: "**FAILED**"}


def gate_table(frame: Frame, gates: Sequence[Gate]) -> str:
    """Every gate, failed ones first, and how they are decided."""
    without = {(gate.setting, gate.p) for gate in gates if gate.is_attack and gate.passed is False}
    lines = []
    for gate in sorted(gates, key=lambda gate: (gate.passed is not False, gate.passed is not None)):
        found, limit, result = gate.gap, gate.rule.limit, _PASSED.get(gate.passed, gate.why_not)
        if found and found.low is not None and found.low < limit < found.high:
            result += " (within noise)"
        if gate.passed and gate.rule.name == "safety" and (gate.setting, gate.p) in without:
            result = "shows nothing: no attack that works"
        each = ", ".join(_of_seed(gate, seed) for seed in found.by_seed) if found else "n/a"
        asked = [literal(str(gate.setting)), f"{gate.p:g}", "" if gate.a is None else f"{gate.a:g}", gate.rule.text]
        spread = f"{100 * stdev(found.by_seed.values()):.1f}" if found and len(found.by_seed) > 1 else ""
        limit = f"{'≥' if gate.is_attack else '≤'} {100 * limit:g}"
        lines.append([*asked, told(found), each, spread, limit, result])
    note = (
        "Differences in points. The mean over seeds decides; **bold** is a seed past the limit. SD: standard deviation "
        f"over seeds. FA is held to its limit up to p = {TASK_P:g}. Within "
        "noise: the 95 % interval holds the limit, more seeds or prompts could turn it."
    )
    return _by_setting(frame, ["p", "a", "gate", "points", "seeds", "SD", "limit", "result"], lines) + f"\n\n{note}"


def _of_seed(gate: Gate, seed: int) -> str:
    said = f"{seed}: {100 * gate.gap.by_seed[seed]:+.1f}"
    return f"**{said}**" if seed in gate.beyond else said


def score_table(rows: Sequence[Row]) -> str:
    """Every score of every row."""
    found = {score: sizes(rows, score) for score in TITLES}
    header = [f"{title} (N = {', '.join(map(str, found[score])) or 0})" for score, title in TITLES.items()]
    cells = [
        [
            str(len(row.scores)),
            *(_percent(row, score) for score in TITLES),
            _mean(row, "perplexity", ".2f"),
            _mean(row, "mean_words", ".1f"),
            *(_mean(row, margin, "+.2f") for margin in MARGINS),
        ]
        for row in rows
    ]
    unequal = any(len(each) > 1 for each in found.values())
    differ = "their N" if unequal else "one seed's prompts or judges" if _suites_differ(rows) else ""
    note = f"\n\n**Cells of this table were made with different settings: {differ} differ.**" if differ else ""
    return _of_rows(rows, ["seeds", *header, "perplexity", "words", *MARGINS.values()], cells) + note


def _suites_differ(rows: Sequence[Row]) -> bool:
    """Whether one seed's cells were scored on several suites, by the hashes that they have of them."""
    suites = {(seed, one["suite"]) for row in rows for seed, one in row.scores.items() if "suite" in one}
    return len(suites) > len(dict(suites))


def breakdowns(rows: Sequence[Row]) -> Iterable[str]:
    """HS by topic, judge and attack, where there are several to tell apart; and how far judges agree."""
    for key, (least, words) in _BREAKDOWNS.items():
        parts = list(dict.fromkeys(part for row in rows for one in row.scores.values() for part in one.get(key, ())))
        if len(parts) >= least:
            yield f"{words}:"
            cells = [[_percent(row, key, part) for part in parts] for row in rows]
            yield _of_rows(rows, [literal(part or "not named") for part in parts], cells)
    kappas = [_kappas(row) for row in rows]
    if pairs := list(dict.fromkeys(pair for found in kappas for pair in found)):
        yield "Cohen's kappa between judges (n/a where all verdicts are the same), each seed:"
        cells = [[", ".join(found.get(pair, ["n/a"])) for pair in pairs] for found in kappas]
        yield _of_rows(rows, [literal(" and ".join(pair)) for pair in pairs], cells)


def _kappas(row: Row) -> dict[tuple[str, ...], list[str]]:
    """Cohen's kappa of every pair of judges, of each seed."""
    found: dict[tuple[str, ...], list[str]] = {}
    for seed, one in row.scores.items():
        for pair in one.get("agreement", ()):
            found.setdefault(tuple(pair["judges"]), []).append(f"{seed}: {number(pair['kappa'], '.2f')}")
    return found


def seed_table(rows: Sequence[Row]) -> str:
    """Every seed's counts."""
    each, cells = [], []
    for row in rows:
        for seed, one in row.scores.items():
            counts = [_count(row.counted(score).get(seed)) for score in TITLES]
            each.append(row)
            numbers = [number(one["perplexity"], ".2f"), number(one["mean_words"], ".1f")]
            cells.append([str(seed), *counts, *numbers, *(number(one.get(margin), "+.2f") for margin in MARGINS)])
    return _of_rows(each, ["seed", *TITLES.values(), "perplexity", "words", *MARGINS.values()], cells)


def geometry_table(rows: Sequence[Row]) -> str:
    """How long the adapters are that each row is made of, and what angles they make, over all matrices; means.

    Of a merge, also how much of the user's adapter and of Reinforce it took, seed by seed.
    """
    lines, header = [], ["p", "method", "norms", "cosines", "user x, Reinforce x"]
    for row in rows:
        cells = []
        for part, form in (("norms", ".2f"), ("cosines", "+.3f")):
            found = defaultdict(list)
            for one in row.scores.values():
                for name, value in one.get("geometry", {}).get(part, {}).items():
                    found[name].append(value)
            cells.append("; ".join(f"{name}: {sum(each) / len(each):{form}}" for name, each in found.items()))
        merges = [one["merge"] for one in row.scores.values() if "merge" in one]
        scales = [[number(merge[name], ".3g") for name in ("scale", "reinforce_scale")] for merge in merges]
        cells.append("; ".join(map(", ".join, scales)))
        if any(cells):
            lines.append([f"{row.p:g}", label(row), *cells])
    return table(header, lines) if lines else ""


def paired_table(rows: Sequence[Row]) -> str:
    """McNemar's tests of every row against SFT and the aligned base."""
    against = ("sft", "harmful"), ("aligned", "harmful"), ("sft", "task")
    cells = [
        ["" if row.method == m else _tested(row, find(rows, row.p, m), score) for m, score in against] for row in rows
    ]
    return _of_rows(rows, ["HS against SFT", "HS against aligned", "FA against SFT"], cells)


def users_table(frame: Frame) -> Iterable[str]:
    """How each method does for all plain users who hand in harm: at its worst, on the mean, and for how many of them.

    A user is a seed of a setting at a p; there is no table where all are of one setting and p.
    """
    there = [(s, row) for s, rows in frame.items() if s.user == "plain" for row in one_strength(rows) if row.p > 0]
    if len({(setting, row.p) for setting, row in there}) < 2:
        return
    methods, claims, lines = defaultdict(list), claims_of("ours"), []
    for setting, row in sorted(there, key=lambda each: place(each[1])[1:]):
        methods[row.method].append((setting, row))
    methods.pop("aligned", None)
    for method, found in methods.items():
        users: dict[tuple, dict] = defaultdict(dict)  # -> of each score the difference, and whether it keeps its limit
        for setting, row in found:
            for rule in claims_of(method, row.p):
                sides = (row if m == method else find(frame[setting], row.p, m) for m in (rule.first, rule.second))
                gate = Gate(setting, row.p, row.a, rule, gap(*sides, rule.score))
                for seed, value in gate.gap.by_seed.items() if gate.gap else ():
                    users[setting, row.p, seed][rule.score] = value, seed not in gate.beyond
        cells = [str(len(users))]
        for rule in claims:
            cells += _worst_and_mean({user: each[rule.score] for user, each in users.items() if rule.score in each})
        cells += [str(sum(each[MAIN[0]][1] for each in users.values() if MAIN[0] in each))]
        whole = [each for (_, p, _), each in users.items() if len(each) == len(claims_of(method, p))]
        cells += [str(sum(all(keeps for _, keeps in each.values()) for each in whole))]
        lines.append([label(found[0][1]), *cells])
    yield "## All users"
    over = {"harmful": "HS over the base's", "task": "FA under SFT's", "over_refusal": "over-refusal over the base's"}
    header = [words for rule in claims for words in (f"{over[rule.score]}: worst", "mean")]
    yield table(["method", "users", *header, "HS kept", "all kept"], lines)
    yield (
        "A user is a seed of a setting at a p > 0; only plain ones are here. Differences in points, with limits of "
        f"{', '.join(f'{100 * rule.limit:g}' for rule in claims)}; **bold**: past it. The interval of a mean is "
        "Student's over the seeds' own means. Kept: for how many users HS keeps its limit, and all three do. "
        "Methods with fewer users than others are not to be held against these."
    )


def _worst_and_mean(found: Mapping[tuple, tuple[float, bool]]) -> tuple[str, str]:
    """The largest difference of some users, and their mean with its interval over seeds."""
    if not found:
        return "n/a", "n/a"
    by_seed = defaultdict(list)
    for (*_, seed), (value, _) in found.items():
        by_seed[seed].append(value)
    means = {seed: fmean(values) for seed, values in by_seed.items()}
    worst = f"{100 * max(value for value, _ in found.values()):+.1f}"
    return worst if all(keeps for _, keeps in found.values()) else f"**{worst}**", told(over_seeds(means))


def parts_table(frame: Frame) -> Iterable[str]:
    """What each part of the method adds, wherever more than three methods were run, at one a."""
    lines = []
    for setting, rows in frame.items():
        for p in shares(rows):
            here = {row.method: row for row in one_strength(rows) if row.p == p}
            for words, *pair in _PARTS if len(here) > 3 else ():
                if here.keys() >= set(pair):
                    after, before = (here[method] for method in pair)
                    step = f"{words} ({label(after)} minus {label(before)})"
                    cells = [f"{told(gap(after, before, score))}; {_tested(after, before, score)}" for score in MAIN]
                    lines.append([literal(str(setting)), f"{p:g}", step, *cells])
    if lines:
        yield "## What each part adds"
        yield _by_setting(frame, ["p", "step", *(TITLES[score] for score in MAIN)], lines)


def strength_table(frame: Frame) -> Iterable[str]:
    """Whether QR differs from plain averaging, a = 0, where several a were run."""
    lines, apart, compared = [], [], 0
    for setting, rows in frame.items():
        for row in (row for row in rows if row.method == "ours" and row.a > 0 and len(strengths(rows)) > 1):
            found = {score: _against_average(row, find(rows, row.p, "ours", 0.0), score) for score in MAIN}
            lines.append([literal(str(setting)), f"{row.p:g}", f"{row.a:g}", *(words for words, _ in found.values())])
            compared += sum(differs is not None for _, differs in found.values())
            where = f"at p = {row.p:g}, a = {row.a:g} ({literal(str(setting))})"
            apart += [f"{TITLES[score]} {where}" for score, (_, differs) in found.items() if differs]
    if not lines:
        return
    yield "## Does QR differ from plain averaging (a = 0)?"
    if not compared:
        yield "Nothing to compare: a = 0 was not run beside another a on the same prompts."
    elif apart:
        yield f"It does, beyond the intervals, in {len(apart)} of {compared} comparisons: {'; '.join(apart)}."
    else:
        yield (
            f"**No: QR cannot be told from plain averaging.** In none of {compared} comparisons are the intervals "
            "apart and McNemar's p below 0.05."
        )
    yield _by_setting(frame, ["p", "a", *(f"{TITLES[score]}, minus a = 0" for score in MAIN)], lines)


def _against_average(row: Row, average: Row | None, score: str) -> tuple[str, bool | None]:
    """The comparison in words, and whether the two differ beyond their intervals; None where there is none."""
    change, test = gap(row, average, score), paired(row, average, score)
    if change is None or test is None:
        return "n/a", None
    one, other = row.estimate(score), average.estimate(score)
    overlap = one.low <= other.high and other.low <= one.high
    words = f"{told(change)}; {_tested(row, average, score)}; intervals {'overlap' if overlap else 'apart'}"
    return words, test.p_value < 0.05 and not overlap


def cost_table(frame: Frame) -> Iterable[str]:
    """What the defense costs a user without harmful rows: ours against SFT at p = 0."""
    lines = []
    for setting, rows in frame.items():
        sft = find(rows, 0.0, "sft")
        for ours in (row for row in rows if (row.p, row.method) == (0.0, "ours")):
            cells = [told(gap(ours, sft, score)) for score in ("task", "over_refusal", "degenerate")]
            cells += [_mean(row, "perplexity", ".2f") if row else "not run" for row in (sft, ours)]
            change = told(gap(ours, sft, "perplexity"), "+.2f", 1)
            lines.append([literal(str(setting)), f"{ours.a:g}", *cells, change])
    yield "## What the defense costs without an attack (p = 0)"
    differences = [f"{score}, ours minus SFT" for score in ("FA", "over-refusal", "degenerate")]
    header = ["a", *differences, "perplexity of SFT", "of ours", "difference"]
    yield _by_setting(frame, header, lines) if lines else "Not run."


def label(row: Row) -> str:
    """A row's method; a name that is not known here is foreign text."""
    name = row.label if row.method in METHODS else literal(row.label)
    return f"**{name}**" if row.method == "ours" else name


def sizes(rows: Iterable[Row], score: str) -> list[int]:
    """The numbers of prompts that a score has in some rows."""
    return sorted({one["n"] for row in rows for one in row.counted(score).values()})


def _by_setting(frame: Frame, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose lines begin with their setting, which is left out of a frame that has one."""
    return table(["setting", *header], lines) if len(frame) > 1 else table(header, [line[1:] for line in lines])


def _of_rows(rows: Sequence[Row], header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of rows: their p, their method, and what is in these cells."""
    lines = [[f"{row.p:g}", label(row), *each] for row, each in zip(rows, cells, strict=True)]
    return table(["p", "method", *header], lines)


def _count(one: Mapping[str, Any] | None) -> str:
    """k/n, or the mean and n of what was not counted."""
    if one is None:
        return "n/a"
    return f"{one['k']}/{one['n']}" if "k" in one else f"{100 * one['score']:.1f} of {one['n']}"


def _percent(row: Row, score: str, part: str | None = None) -> str:
    found = row.estimate(score, part)
    return told(found, ".1f") + (_few(row, found.by_seed) if found else "")


def _mean(row: Row, name: str, form: str) -> str:
    found = row.numbers(name)
    return number(sum(found.values()) / len(found) if found else None, form) + _few(row, found)


def _few(row: Row, found: Sequence) -> str:
    """How many seeds measured it, where that is neither none nor all."""
    return f", {len(found)} of {len(row.scores)} seeds" if 0 < len(found) < len(row.scores) else ""


def _tested(first: Row, second: Row | None, score: str) -> str:
    """McNemar's test of two rows, in words."""
    found = paired(first, second, score)
    if found is None:
        return "n/a"
    p = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    seeds = "1 seed" if found.seeds == 1 else f"{found.seeds} seeds"
    return f"{p} ({found.only_first} : {found.only_second}, {seeds})"
