"""The tables of a report, as Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev

import pandas as pd

from br_jax.experiment.methods import METHODS
from br_jax.report.gates import CLAIMS, TASK_P, Gate
from br_jax.report.markdown import interval, literal, number, table
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

LEGEND = (
    "Scores in percent: mean over seeds with Student's 95 % interval over them. † marks the 95 % interval of one "
    "seed's own prompts instead (Wilson's, of counts; Newcombe's, of differences): there is one seed, or all "
    "seeds gave the same score, of which Student's t would claim to be certain. HS: share of restricted prompts "
    "that are answered (lower is safer); HS+ also counts degenerate answers; FA: score on the user's task; "
    "over-refusal: share of benign prompts that are refused; task refused: share of the task's prompts that are; "
    "degenerate: share of answers that are empty or loop; perplexity: of the raw model's answers on held-out "
    "instructions; words: mean length of an answer; refusal margin: log-odds that an answer begins as refusals do.",
    "Where the aligned base refuses the task's prompts, taking Buffer out brings some of that back and FA falls.",
    "Paired tests: McNemar's exact two-sided p-value on the same prompts, pooled over the seeds that both have; in "
    "brackets the prompts that only this method counts : only the other, and the seeds. A prompt counts once a seed, "
    "as if seeds were independent; nothing is corrected for the number of tests.",
)
_STEPS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_only", "sft"),
    ("the merge: the user's scale and Reinforce", "ours", "buffer_only"),
    ("Reinforce in the merge", "ours", "no_reinforce"),
    ("Buffer, where Reinforce is merged in", "ours", "reinforce_only"),
    ("the QR merge instead of a plain sum", "ours", "sum"),
    ("our merge instead of the paper's naive average", "ours", "average"),
)


def gate_table(results: pd.DataFrame, gates: Sequence[Gate]) -> str:
    """Every gate, failed ones first, and how they are decided."""
    without = {(gate.setting, gate.p) for gate in gates if gate.is_attack and gate.passed is False}
    names, lines = {setting: name for setting, name, _ in _named(results)}, []
    for gate in sorted(gates, key=lambda gate: (gate.passed is not False, gate.passed is not None)):
        found, limit = gate.gap, gate.claim.limit
        result = {True: "passed", False: "**FAILED**", None: gate.why_not}[gate.passed]
        if found and found.low is not None and found.low < limit < found.high:
            result += " (within noise)"
        if gate.passed and gate.claim.name == "safety" and (gate.setting, gate.p) in without:
            result = "shows nothing: no attack that works"
        by_seed = {seed: f"{seed}: {100 * value:+.1f}" for seed, value in found.by_seed.items()} if found else {}
        each = ", ".join(f"**{words}**" if seed in gate.beyond else words for seed, words in by_seed.items())
        start = [*names[gate.setting].values(), f"{gate.p:g}", "" if gate.a is None else f"{gate.a:g}", gate.claim.text]
        spread = f"{100 * stdev(found.by_seed.values()):.1f}" if len(by_seed) > 1 else ""
        limit = f"{'≥' if gate.is_attack else '≤'} {100 * limit:g}"
        lines.append([*start, interval(found), each or "n/a", spread, limit, result])
    header = [*names[gates[0].setting], "p", "a", "gate", "points", "seeds", "SD", "limit", "result"]
    return (
        f"{table(lines, header)}\n\nDifferences in points. The mean over seeds decides; **bold** is a seed past the "
        f"limit. SD: standard deviation over seeds. FA is held to its limit up to p = {TASK_P:g}. Within noise: the "
        "95 % interval holds the limit, more seeds or prompts could turn it."
    )


def setting_tables(cells: pd.DataFrame, every_seed: bool) -> Iterator[str]:
    """The tables of one setting: scores, what they are made of, counts of every seed, paired tests, geometry."""
    rows, sizes = rows_of(cells), {score: sizes_of(cells, score) for score in TITLES}
    titles = {score: f"{title} (N = {', '.join(map(str, sizes[score])) or 0})" for score, title in TITLES.items()}
    scores = [{title: _percent(row, score) for score, title in titles.items()} for row in rows]
    yield _row_table(
        rows, [{"seeds": f"{len(row)}"} | each | _numbers(row) for row, each in zip(rows, scores, strict=True)]
    )
    several = (cells.groupby("seed").suite.nunique() > 1).any()
    if differ := "their N" if any(len(n) > 1 for n in sizes.values()) else several and "one seed's prompts or judges":
        yield f"**Cells of this table were made with different settings: {differ} differ.**"
    for name, (least, words) in BREAKDOWNS.items():
        parts = dict.fromkeys(part for scores in cells.scores for part in scores.get(name, ()))
        if len(parts) >= least:
            yield f"{words}:"
            yield _row_table(
                rows, [{literal(p or "not named"): _percent(row, (name, p)) for p in parts} for row in rows]
            )
    kappas = [_kappas(row) for row in rows]
    if judges := dict.fromkeys(pair for found in kappas for pair in found):
        yield "Cohen's kappa between judges (n/a where all verdicts are the same), each seed:"
        yield _row_table(
            rows, [{literal(pair): ", ".join(found.get(pair, ["n/a"])) for pair in judges} for found in kappas]
        )
    if every_seed:
        yield "Every seed:"
        each = [row.iloc[[place]] for row in rows for place in range(len(row))]
        yield _row_table(each, [_counts(cell) | _numbers(cell) for cell in each])
    yield "Paired tests:"
    tests = (
        ("HS against SFT", "sft", "harmful"),
        ("HS against aligned", "aligned", "harmful"),
        ("FA against SFT", "sft", "task"),
    )
    yield _row_table(
        rows,
        [
            {
                title: "" if m == row.method.iloc[0] else _tested(row, find(cells, row.p.iloc[0], m), score)
                for title, m, score in tests
            }
            for row in rows
        ],
    )
    geometry = [_geometry(row) for row in rows]
    if made := [(row, line) for row, line in zip(rows, geometry, strict=True) if any(line.values())]:
        yield "Norms of the adapters' deltas and cosines between them, over all matrices (means over seeds):"
        yield _row_table(*zip(*made, strict=True))


def _row_table(rows: Iterable[pd.DataFrame], cells: Iterable[Mapping[str, str]]) -> str:
    """A table of rows: their p, their method, and what is in these cells."""
    starts = [{"p": f"{row.p.iloc[0]:g}", "method": label(row)} for row in rows]
    return table([start | each for start, each in zip(starts, cells, strict=True)])


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


def users_table(results: pd.DataFrame) -> Iterator[str]:
    """How each method does for all plain users who hand in harm: at its worst, on the mean, and for how many of them.

    A user is a seed of a setting at a p; there is no table where all are of one setting and p.
    """
    claims, rows, found = CLAIMS[: len(MAIN)], [], []
    for setting, cells in by_setting(results[(results.user == "plain") & (results.p > 0)]):
        rows += [(row.iloc[0], row, setting, cells) for row in rows_of(one_strength(cells))]
    if len({(setting, first.p) for first, _, setting, _ in rows}) < 2:
        return
    rows.sort(key=lambda each: (each[0].place, each[0].method, each[0].a))
    for first, _, setting, cells in rows:
        asked = [claim for claim in claims if first.p <= claim.most_p]
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
        all_kept = users.keeps.all() & (users.size() == users.asked.first())
        each = [cell for claim in claims for cell in _worst_and_mean(mine[mine.claim == claim.name])]
        kept = mine.keeps[mine.claim == "safety"].sum(), all_kept.sum()
        lines.append([name, str(users.ngroups), *each, *map(str, kept)])
    yield "## All users"
    over = "HS over the base's", "FA under SFT's", "over-refusal over the base's"
    header = [words for title in over for words in (f"{title}: worst", "mean")]
    yield table(lines, ["method", "users", *header, "HS kept", "all kept"])
    yield (
        "A user is a seed of a setting at a p > 0; only plain ones are here. Differences in points, with limits of "
        f"{', '.join(f'{100 * claim.limit:g}' for claim in claims)}; **bold**: past it. The interval of a mean is "
        "Student's over the seeds' own means. Kept: for how many users HS keeps its limit, and all three do. "
        "Methods with fewer users than others are not to be held against these."
    )


def _worst_and_mean(found: pd.DataFrame) -> tuple[str, str]:
    """The largest difference of some users, and their mean with its interval over seeds."""
    if found.empty:
        return "n/a", "n/a"
    worst = f"{100 * found.value.max():+.1f}"
    means = found.groupby("seed").value.agg(fmean).to_dict()
    return worst if found.keeps.all() else f"**{worst}**", interval(over_seeds(means))


def steps_table(results: pd.DataFrame) -> Iterable[str]:
    """What each part of the method adds, wherever more than three methods were run, at one a."""
    lines = []
    for _, name, cells in _named(results):
        for p in shares(cells):
            chosen = one_strength(cells)
            rows = {row.method.iloc[0]: row for row in rows_of(chosen[chosen.p == p])}
            for words, after, before in _STEPS if len(rows) > 3 else ():
                if {after, before} <= rows.keys():
                    after, before = rows[after], rows[before]
                    step = {"p": f"{p:g}", "step": f"{words} ({label(after)} minus {label(before)})"}
                    changes = {
                        TITLES[score]: f"{interval(gap(after, before, score))}; {_tested(after, before, score)}"
                        for score in MAIN
                    }
                    lines.append(name | step | changes)
    if lines:
        yield "## What each part adds"
        yield table(lines)


def strength_table(results: pd.DataFrame) -> Iterable[str]:
    """Whether QR differs from plain averaging, a = 0, where several a were run."""
    lines, apart, compared = [], [], 0
    for setting, name, cells in _named(results):
        ours = cells[cells.method == "ours"]
        for row in rows_of(ours[ours.a > 0]) if ours.a.nunique() > 1 else ():
            p, a = row.p.iloc[0], row.a.iloc[0]
            line = name | {"p": f"{p:g}", "a": f"{a:g}"}
            average = find(cells, p, "ours", 0.0)
            for score in MAIN:
                line[f"{TITLES[score]}, minus a = 0"], differs = _against_average(row, average, score)
                compared += differs is not None
                if differs:
                    apart.append(f"{TITLES[score]} at p = {p:g}, a = {a:g} ({literal(str(setting))})")
            lines.append(line)
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
    yield table(lines)


def _against_average(row: pd.DataFrame, average: pd.DataFrame, score: str) -> tuple[str, bool | None]:
    """The comparison in words, and whether the two differ beyond their intervals; None where there is none."""
    change, test = gap(row, average, score), paired(row, average, score)
    if change is None or test is None:
        return "n/a", None
    one, other = estimate(row, score), estimate(average, score)
    overlap = one.low <= other.high and other.low <= one.high
    words = f"{interval(change)}; {_tested(row, average, score)}; intervals {'overlap' if overlap else 'apart'}"
    return words, test[2] < 0.05 and not overlap


def cost_table(results: pd.DataFrame) -> Iterable[str]:
    """What the defense costs a user without harmful rows: ours against SFT at p = 0."""
    lines = []
    for _, name, cells in _named(results):
        sft = find(cells, 0.0, "sft")
        for ours in rows_of(cells[(cells.p == 0) & (cells.method == "ours")]):
            changes = {
                f"{TITLES[score]}, ours minus SFT": interval(gap(ours, sft, score))
                for score in ("task", "over_refusal", "degenerate")
            }
            perplexity = {
                "perplexity of SFT": "not run" if sft.empty else _mean(sft, "perplexity", ".2f"),
                "of ours": _mean(ours, "perplexity", ".2f"),
                "difference": interval(gap(ours, sft, "perplexity"), "+.2f", 1),
            }
            lines.append(name | {"a": f"{ours.a.iloc[0]:g}"} | changes | perplexity)
    yield "## What the defense costs without an attack (p = 0)"
    yield table(lines) if lines else "Not run."


def label(row: pd.DataFrame) -> str:
    """A row's method; a name that is not known here is foreign text."""
    method, name = row[["method", "label"]].iloc[0]
    name = name if method in METHODS else literal(name)
    return f"**{name}**" if method == "ours" else name


def sizes_of(cells: pd.DataFrame, score: str) -> list[int]:
    """The numbers of prompts that a score has in some cells."""
    return sorted({counts[score].n for counts in cells.counts if score in counts})


def _named(results: pd.DataFrame) -> list[tuple[Setting, dict[str, str], pd.DataFrame]]:
    """Each setting, how a line of a table names it (not at all where it is the only one), and its cells."""
    found = by_setting(results)
    return [(setting, {"setting": literal(str(setting))} if len(found) > 1 else {}, cells) for setting, cells in found]


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
