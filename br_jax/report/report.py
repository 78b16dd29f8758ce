"""The report of a run or of a sweep: what was run, does the claim hold, the tables behind it, and how to repeat it."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from br_jax.core.bounds import ROWS, require
from br_jax.core.errors import UserError
from br_jax.report import run_report, tables
from br_jax.report.figures import draw_results, figures_of
from br_jax.report.gates import TASK_P, check, outcome
from br_jax.report.markdown import CUT, literal, number, render, write_document
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
    gates, settings = check(results), by_setting(results)
    values = {
        "command": run.results.get("command") if run else command,
        "examples": examples,
        "run": run_report.values(run, results, examples) if run else None,
        "gates": gates,
        "headline": _HEADLINES[outcome(gates)],
        "mixed": mixed(results),
        "lists": _lists(results),
        "count": len(results),
        "absent": absent(results),
        "settings": [
            {"title": literal(str(setting)), "figures": figures_of(results, setting)} | tables.setting_tables(found)
            for setting, found in settings
        ],
        **tables.comparisons(results, gates),
        "task_p": TASK_P,
        "cut": CUT,
    }
    return write_document(workdir / ("report.md" if run else "sweep.md"), render("report.md.jinja", values), drawn)


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


def _lists(results: pd.DataFrame) -> dict[str, list[str]]:
    """What was run: each of a kind once."""
    settings = pd.DataFrame([setting for setting, _ in by_setting(results)])
    settings["model"] = [setting.model_name for setting, _ in by_setting(results)]
    columns = {"models": "model", "tasks": "task", "users": "user", "topics of the harmful rows": "topic"}
    lists = {words: map(literal, settings[column]) for words, column in columns.items()}
    lists |= {
        "user rows n": map(str, settings.n),
        "share of harmful rows p": (f"{p:g}" for p in shares(results)),
        "seeds": map(str, sorted({*results.index})),
        "methods": map(tables.label, rows_of(results.sort_values(["place", "method", "a"]))),
    }
    lists |= {f"N of {title}": map(str, tables.sizes_of(results, score)) for score, title in TITLES.items()}
    return {words: [*dict.fromkeys(values)] for words, values in lists.items()}
