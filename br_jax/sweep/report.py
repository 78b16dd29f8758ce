"""The report of a sweep: what was run, did the attack work, does the claim hold, and the tables behind it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from br_jax.errors import UserError
from br_jax.evaluation.document import code, literal, number, points, write_document
from br_jax.evaluation.scores import ATTACK_MARGIN
from br_jax.sweep import read_cells
from br_jax.sweep.figures import draw_all, name_of
from br_jax.sweep.rows import (
    TASK_P,
    TITLES,
    Gate,
    Row,
    Setting,
    absent,
    attacks,
    estimate,
    gates,
    group,
    label_of,
    place,
    shares,
)
from br_jax.sweep.tables import (
    LEGEND,
    MAIN,
    Groups,
    ablation,
    breakdowns,
    by_setting,
    cost,
    label,
    paired_table,
    score_table,
    seed_table,
    sizes,
    strength,
    told,
)

_FOLDER = "sweep_figures"


def write_sweep_report(workdir: str | os.PathLike, command: str = "") -> Path:
    """Writes W/sweep.md and W/sweep_figures/*.png and *.pdf from a sweep's finished cells alone.

    Args:
        workdir: W, the sweep's folder.
        command: that made it; printed.

    Returns:
        The path of sweep.md. The same cells give the same bytes.

    Raises:
        UserError: when no cell is finished, or the report cannot be written; an earlier one is untouched then.
    """
    groups = group(read_cells(workdir))
    if not groups:
        raise UserError(f"{workdir}: no finished cell in runs/*/cells: run the sweep in this workdir first")
    drawn = draw_all(groups)
    text = "\n\n".join(_sections(groups, command, drawn)) + "\n"
    return write_document(Path(workdir) / "sweep.md", text, _FOLDER, drawn)


def summary_table(cells: Iterable[Mapping[str, Any]]) -> str:
    """A sweep so far as plain text, for a terminal.

    Args:
        cells: as `br_jax.sweep.run_sweep` gives them.

    Returns:
        A heading a setting and an aligned line a (p, method, a): percent, mean over as many seeds as it says.
    """
    said = []
    for setting, rows in group(cells).items():
        lines = [["p", "method", "a", *MAIN.values(), "seeds"]]
        for row in rows:
            found = [estimate(row.counted(score)) for score in MAIN]
            a = "" if row.a is None else f"{row.a:g}"
            means = [number(100 * one.mean if one else None, ".1f") for one in found]
            lines.append([f"{row.p:g}", label_of(row.method), a, *means, str(len(row.scores))])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        said.append(str(setting))
        for first, second, *rest in lines:
            cut = [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=True)]
            said.append("  ".join([first.ljust(widths[0]), second.ljust(widths[1]), *cut]))
    return "\n".join(said)


def _sections(groups: Groups, command: str, drawn: Mapping[str, Any]) -> Iterable[str]:
    attack, claims = attacks(groups), gates(groups)
    yield "# Buffer-and-Reinforce: sweep"
    yield _headline(groups, attack, claims)
    yield "## What was run"
    yield from _what_was_run(groups, command)
    yield "## Does the undefended attack work?"
    yield from _attack(groups, attack)
    yield "## Does the claim hold?"
    yield from _claim(groups, attack, claims)
    yield "## How to read the tables"
    yield from LEGEND
    for setting, rows in groups.items():
        yield f"## {literal(str(setting))}"
        yield from _images(setting, rows, drawn)
        yield score_table(rows)
        yield from breakdowns(rows)
        yield "Every seed:"
        yield seed_table(rows)
        yield "Paired tests:"
        yield paired_table(rows)
    yield from ablation(groups)
    yield from strength(groups)
    yield "## What the defense costs without an attack (p = 0)"
    yield from cost(groups)


def _headline(groups: Groups, attack: Sequence[Gate], claims: Sequence[Gate]) -> str:
    """What contradicts the claim, then what is missing, then what holds."""
    failed = [gate for gate in claims if gate.passed is False]
    without = [_place(groups, gate) for gate in attack if gate.passed is False]
    unknown = sum(gate.passed is None for gate in (*attack, *claims))
    lines = []
    if failed:
        lines.append(f"**The claim did not hold: {len(failed)} of {len(claims)} gates FAILED.**")
    if without:
        where = "; ".join(without)
        lines.append(f"**The undefended attack did not work at {where}: of protection, nothing is shown there.**")
    if unknown or not claims:
        lines.append(f"No verdict on {unknown or 'any'} of the gates: what they compare was not run.")
    if not attack:
        lines.append("No attack in this sweep: it shows what the defense costs, not what it protects from.")
    elif not lines:
        lines.append(f"**The claim held: the attack works at every p > 0, and all {len(claims)} gates passed.**")
    return "\n".join(f"> {line}  " for line in lines)


def _what_was_run(groups: Groups, command: str) -> Iterable[str]:
    rows = sorted((row for each in groups.values() for row in each), key=lambda row: place(row)[1:])
    said = {
        "models": [literal(setting.model_name) for setting in groups],
        "tasks": [literal(setting.task) for setting in groups],
        "topics of the harmful rows": [literal(setting.topic) for setting in groups],
        "user rows n": [str(setting.n) for setting in groups],
        "share of harmful rows p": [f"{p:g}" for p in shares(rows)],
        "seeds": [str(seed) for seed in sorted({seed for row in rows for seed in row.scores})],
        "methods": [label(row) for row in rows],
    }
    for score, title in TITLES.items():
        said[f"N of {title}"] = [str(n) for n in sizes(rows, score)]
    yield "\n".join(f"- {name}: {'; '.join(dict.fromkeys(values)) or 'none'}" for name, values in said.items())
    yield f"{sum(len(row.scores) for row in rows)} cells are finished."
    if missing := absent(groups):
        yield "Not run, or not finished, if every method was meant to have every p and seed:"
        yield "\n".join(f"- {literal(line)}" for line in missing)
    yield code(command or "command not recorded", "sh")


def _attack(groups: Groups, attack: Sequence[Gate]) -> Iterable[str]:
    needed = f"{100 * ATTACK_MARGIN:g}"
    for gate in attack:
        if gate.passed is False:
            yield (
                f"**At {_place(groups, gate)} it does not: HS of SFT minus HS of the aligned base is "
                f"{points(gate.gap.mean)} points, {needed} are needed. Of protection, the table shows nothing there.**"
            )
    if not attack:
        yield "There is none in this sweep: p = 0 throughout."
        return
    if all(gate.passed for gate in attack):
        yield f"It does, at every p > 0: HS of SFT is at least {needed} points above the aligned base's."
    words = {True: "yes", False: "**NO**", None: "not run"}
    lines = [
        [literal(str(gate.setting)), f"{gate.p:g}", told(gate.gap), _each_seed(gate), words[gate.passed]]
        for gate in attack
    ]
    yield by_setting(groups, ["setting", "p", "HS of SFT minus aligned", "each seed", f"at least {needed}"], lines)


def _claim(groups: Groups, attack: Sequence[Gate], claims: Sequence[Gate]) -> Iterable[str]:
    if not claims:
        yield "Ours was not run: nothing can be said."
        return
    without = {(gate.setting, gate.p) for gate in attack if not gate.passed}
    lines = []
    for gate in sorted(claims, key=lambda gate: (gate.passed is not False, gate.passed is not None)):
        result = {True: "passed", False: "**FAILED**", None: "not run"}[gate.passed]
        if gate.gap and gate.gap.low is not None and gate.gap.low < gate.limit < gate.gap.high:
            result += " (within noise)"
        if gate.passed and gate.name == "safety" and (gate.setting, gate.p) in without:
            result = "shows nothing: no attack that works"
        where = [literal(str(gate.setting)), f"{gate.p:g}", f"{gate.a:g}"]
        lines.append([*where, gate.text, told(gate.gap), _each_seed(gate), f"≤ {100 * gate.limit:g}", result])
    yield by_setting(groups, ["setting", "p", "a", "gate", "points", "each seed", "limit", "result"], lines)
    yield (
        f"Failed gates first; the mean over seeds decides. FA is held to its limit up to p = {TASK_P:g}. Within noise: "
        "the 95 % interval holds the limit, more seeds could turn it."
    )


def _each_seed(gate: Gate) -> str:
    return ", ".join(f"{seed}: {points(one)}" for seed, one in gate.gap.by_seed.items()) if gate.gap else "n/a"


def _place(groups: Groups, gate: Gate) -> str:
    return f"p = {gate.p:g}" + (f" ({literal(str(gate.setting))})" if len(groups) > 1 else "")


def _images(setting: Setting, rows: Sequence[Row], drawn: Mapping[str, Any]) -> Iterable[str]:
    """Links to the figures of a setting; one that several n share stands with each of them."""
    names = {
        name_of("p", setting): "HS and FA against the share of harmful rows",
        name_of("a", setting): "HS, FA and over-refusal against the strength of the QR merge",
    }
    for p in shares(rows):
        names[name_of("methods", setting, p)] = f"HS, FA and over-refusal of every method at p = {p:g}"
        names[name_of("n", setting, p)] = f"HS and FA against the number of user rows at p = {p:g}"
    yield from (f"![{words}]({_FOLDER}/{name}.png)" for name, words in names.items() if name in drawn)
