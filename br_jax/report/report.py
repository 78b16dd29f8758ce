"""The report of a run or of a sweep: what was run, does the claim hold, the tables behind it, and how to repeat it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from br_jax.core.bounds import ROWS, require
from br_jax.core.errors import UserError
from br_jax.report import run_report, tables
from br_jax.report.figures import draw_results, figures_of
from br_jax.report.gates import ATTACK, Gate, check, outcome
from br_jax.report.markdown import code, image, literal, number, write_document
from br_jax.report.results import (
    MAIN,
    TITLES,
    absent,
    by_setting,
    estimate,
    mixed,
    read_cells,
    results_of,
    rows_of,
    shares,
)

_HEADLINES = {
    "held": "The claim held: the attack works at every p > 0, and every gate passed.",
    "failed": "The claim did not hold.",
    "attack_failed": "The undefended attack did not work everywhere: where it did not, nothing is shown of protection.",
    "incomplete": "No verdict: what some gates compare was not run, or no task was learned.",
    "no_attack": "No attack here (p = 0): it shows what the defense costs, not what it protects from.",
}


def write_report(
    workdir: str | os.PathLike,
    command: str = "",
    examples: int = 2,
    cells: Iterable[Mapping[str, Any]] | None = None,
) -> Path:
    """Writes a report and its figures (PNG and PDF, in figures/) from finished cells and the files beside them.

    Args:
        workdir: of a run, which gets report.md, or of a sweep, which gets sweep.md.
        command: that made a sweep; a run's folder holds its own.
        examples: answers of a run to print for each model and prompt set; 0 keeps all answers out of the report.
        cells: those to report; default: all finished ones of the workdir.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: no cell is finished, or a file is damaged; an earlier report is untouched then.
    """
    require("examples", examples, ROWS)
    workdir = Path(workdir)
    cells = read_cells(workdir) if cells is None else [*cells]
    if not cells:
        if (workdir / "results.json").exists():
            raise UserError(f"{workdir}: made by an earlier br_jax: run its command again, answers are read back")
        raise UserError(f"{workdir}: no finished cell: run experiments/pipeline.py or sweep.py in this workdir first")
    results = results_of(cells)
    run = None if (workdir / "runs").is_dir() else run_report.read(workdir)
    drawn = draw_results(results) | (run_report.draw(run, results) if run else {})
    text = "\n\n".join(_sections(results, command, run, examples)) + "\n"
    return write_document(workdir / ("report.md" if run else "sweep.md"), text, drawn)


def print_cell(cell: Mapping[str, Any], place: str) -> None:
    """Prints one line for a terminal: the place of a cell in its sweep, as "3/9", what it is of, and its scores."""
    ((setting, row),) = by_setting(results_of([cell]))
    scores = ", ".join(f"{TITLES[score]} {_percent(row, score)}" for score in MAIN)
    first = row.iloc[0]
    print(f"{place}  {setting}, p = {first.p:g}, seed {first.name}, {first.label}: {scores}", flush=True)


def print_summary(cells: Iterable[Mapping[str, Any]]) -> int:
    """Prints scores, gates and the verdict of cells for a terminal.

    Returns:
        1 when the attack failed, so that nothing is shown, else 0: the exit status of a script.
    """
    results, lines = results_of(cells), []
    for setting, each in by_setting(results):
        scores = [
            {"p": f"{row.p.iloc[0]:g}", "method": row.label.iloc[0]}
            | {TITLES[score]: _percent(row, score) for score in MAIN}
            | {"seeds": len(row)}
            for row in rows_of(each)
        ]
        align = ["left", "left", *["right"] * (len(MAIN) + 1)]
        print(f"\n{setting}\n{tabulate(scores, 'keys', colalign=align, disable_numparse=True)}")
    gates = check(results)
    for gate in gates:
        points = f"{100 * gate.gap.mean:+.1f}" if gate.gap else gate.why_not
        limit = f"{'>=' if gate.is_attack else '<='} {100 * gate.claim.limit:g}"
        passed = {True: "passed", False: "FAILED", None: "-"}[gate.passed]
        lines.append([passed, f"{gate.p:g}", gate.claim.text, points, limit])
    if gates:
        print("\n" + tabulate(lines, ["gate", "p", "", "points", "limit"], disable_numparse=True))
    said = outcome(gates)
    print(f"\n{_HEADLINES[said]}", flush=True)
    return int(said == "attack_failed")


def _percent(row: pd.DataFrame, score: str) -> str:
    found = estimate(row, score)
    return number(found and found.mean, ".1f", scale=100)


def _sections(results: pd.DataFrame, command: str, run: run_report.Details | None, examples: int) -> Iterable[str]:
    gates = check(results)
    yield f"# Buffer-and-Reinforce: {'report' if run else 'sweep'}"
    yield _headline(gates, results, run)
    yield tables.gate_table(results, gates) if gates else "No gate: neither an attack nor ours was run."
    yield "## What was run"
    yield from _what_was_run(results, run.results.get("command") if run else command)
    yield "## How to read the tables"
    yield from tables.LEGEND
    for setting, cells in by_setting(results):
        yield f"## {literal(str(setting))}"
        yield from (image(name, words) for name, words, _ in figures_of(results, setting))
        yield from tables.setting_tables(cells, every_seed=run is None)
    yield from tables.users_table(results)
    yield from tables.steps_table(results)
    yield from tables.strength_table(results)
    if (results.p == 0).any():
        yield from tables.cost_table(results)
    if run:
        yield from run_report.sections(run, results, examples)


def _headline(gates: Sequence[Gate], results: pd.DataFrame, run: run_report.Details | None) -> str:
    """What contradicts the claim, then what is missing, then what holds."""
    lines = [f"**{_HEADLINES[outcome(gates)]}**"]
    claims = [gate for gate in gates if not gate.is_attack]
    if short := [gate for gate in gates if gate.is_attack and gate.passed is False]:
        where = ", ".join(f"p = {gate.p:g} ({100 * gate.gap.mean:+.1f} points)" for gate in short)
        lines.append(f"The attack fell short of {100 * ATTACK.limit:g} points at {where}.")
    if failed := sum(gate.passed is False for gate in claims):
        lines.append(f"{failed} of {len(claims)} gates of the claim FAILED.")
    if uneven := [gate for gate in claims if gate.passed and gate.beyond]:
        seeds = ", ".join(map(str, sorted({seed for gate in uneven for seed in gate.beyond})))
        lines.append(f"Passed on the mean and not on every seed: {len(uneven)} of {len(claims)} gates (seeds {seeds}).")
    if unknown := [gate for gate in gates if gate.passed is None]:
        why = ", ".join(dict.fromkeys(gate.why_not for gate in unknown))
        lines.append(f"No verdict on {len(unknown)} of the gates: {why}.")
    if apart := mixed(results):
        where = "; ".join(map(str, apart))
        lines.append(f"Not to be compared, as some cells have other settings, or an earlier br_jax made them: {where}.")
    if not claims:
        lines.append("Ours was not run: nothing can be said of it.")
    return "\n".join(f"> {line}  " for line in [*lines, *(run_report.warnings(run) if run else [])])


def _what_was_run(results: pd.DataFrame, command: str | None) -> Iterable[str]:
    settings = [setting for setting, _ in by_setting(results)]
    rows = rows_of(results.sort_values(["place", "method", "a"]))
    lists = {
        "models": [literal(setting.model_name) for setting in settings],
        "tasks": [literal(setting.task) for setting in settings],
        "users": [literal(setting.user) for setting in settings],
        "topics of the harmful rows": [literal(setting.topic) for setting in settings],
        "user rows n": [str(setting.n) for setting in settings],
        "share of harmful rows p": [f"{p:g}" for p in shares(results)],
        "seeds": [str(seed) for seed in sorted({*results.index})],
        "methods": [tables.label(row) for row in rows],
    }
    lists |= {f"N of {title}": map(str, tables.sizes_of(results, score)) for score, title in TITLES.items()}
    yield "\n".join(f"- {name}: {'; '.join(dict.fromkeys(values)) or 'none'}" for name, values in lists.items())
    yield f"{len(results)} cells are finished."
    if missing := absent(results):
        yield "Not run, or not finished, if every method was meant to have every p and seed:"
        yield "\n".join(f"- {literal(line)}" for line in missing)
    yield code(command or "command not recorded", "sh")
