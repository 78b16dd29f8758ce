"""The report of a run or of a sweep: what was run, does the claim hold, the tables behind it, and how to repeat it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from br_jax.core.bounds import ROWS, require
from br_jax.core.errors import UserError
from br_jax.report import run_report as details
from br_jax.report import tables
from br_jax.report.figures import draw_frame, name_of
from br_jax.report.gates import ATTACK, Gate, check, outcome
from br_jax.report.markdown import code, image, literal, number, write_document
from br_jax.report.results import (
    MAIN,
    TITLES,
    Frame,
    Row,
    Setting,
    absent,
    make_frame,
    mixed,
    place,
    read_cells,
    shares,
)

_HEADLINES = {
    "held": "The claim held: the attack works at every p > 0, and every gate passed.",
    "failed": "The claim did not hold.",
    "attack_failed": "The undefended attack did not work everywhere: where it did not, nothing is shown of protection.",
    "incomplete": "No verdict: what some gates compare was not run, or no task was learned.",
    "no_attack": "No attack here (p = 0): it shows what the defense costs, not what it protects from.",
}


def write_report(workdir: str | os.PathLike, command: str = "", examples: int = 2) -> Path:
    """Writes a report and its figures (PNG and PDF, in figures/) from finished cells and the files beside them.

    Args:
        workdir: of a run, which gets report.md, or of a sweep, which gets sweep.md.
        command: that made a sweep; a run's folder holds its own.
        examples: answers of a run to print for each model and prompt set; 0 keeps all answers out of the report.

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: when no cell is finished, a file is damaged, or the report cannot be written; an earlier one is
            untouched then.
    """
    require("examples", examples, ROWS)
    workdir = Path(workdir)
    cells = read_cells(workdir)
    frame = make_frame(cells)
    if not frame:
        if (workdir / "results.json").exists():
            raise UserError(f"{workdir}: made by an earlier br_jax: run its command again, answers are read back")
        raise UserError(f"{workdir}: no finished cell: run experiments/pipeline.py or sweep.py in this workdir first")
    drawn, run = draw_frame(frame), None
    if not (workdir / "runs").is_dir():
        run = details.read(workdir)
        drawn |= details.draw(run, frame)
    text = "\n\n".join(_sections(frame, mixed(cells), command, drawn, run, examples)) + "\n"
    return write_document(workdir / ("sweep.md" if run is None else "report.md"), text, drawn)


def print_cell(cell: Mapping[str, Any], place: str) -> None:
    """Prints one line for a terminal: the place of a cell in its sweep, as "3/9", what it is of, and its scores."""
    ((setting, (row,)),) = make_frame([cell]).items()
    scores = ", ".join(f"{TITLES[score]} {_percent(row, score)}" for score in MAIN)
    print(f"{place}  {setting}, p = {row.p:g}, seed {cell['run']['seed']}, {row.label}: {scores}", flush=True)


def print_summary(cells: Iterable[Mapping[str, Any]]) -> int:
    """Prints scores, gates and the verdict of cells for a terminal.

    Returns:
        1 when the attack failed, so that nothing is shown, else 0: the exit status of a script.
    """
    frame = make_frame(cells)
    for setting, rows in frame.items():
        lines = []
        for row in rows:
            lines.append([f"{row.p:g}", row.label, *(_percent(row, score) for score in MAIN), len(row.scores)])
        print(f"\n{setting}")
        header = ["p", "method", *(TITLES[score] for score in MAIN), "seeds"]
        align = ["left", "left", *["right"] * (len(header) - 2)]
        print(tabulate(lines, header, colalign=align, disable_numparse=True))
    gates, lines = check(frame), []
    for gate in gates:
        points = f"{100 * gate.gap.mean:+.1f}" if gate.gap else gate.why_not
        limit = f"{'>=' if gate.is_attack else '<='} {100 * gate.rule.limit:g}"
        passed = {True: "passed", False: "FAILED", None: "-"}[gate.passed]
        lines.append([passed, f"{gate.p:g}", gate.rule.text, points, limit])
    if gates:
        print("\n" + tabulate(lines, ["gate", "p", "", "points", "limit"], disable_numparse=True))
    said = outcome(gates)
    print(f"\n{_HEADLINES[said]}", flush=True)
    return int(said == "attack_failed")


def _percent(row: Row, score: str) -> str:
    found = row.estimate(score)
    return number(found and found.mean, ".1f", scale=100)


def _sections(
    frame: Frame,
    apart: Sequence[Setting],
    command: str,
    drawn: Mapping[str, Any],
    run: details.Details | None,
    examples: int,
) -> Iterable[str]:
    gates = check(frame)
    yield f"# Buffer-and-Reinforce: {'sweep' if run is None else 'report'}"
    yield _headline(gates, apart, run)
    yield tables.gate_table(frame, gates) if gates else "No gate: neither an attack nor ours was run."
    yield "## What was run"
    yield from _what_was_run(frame, command if run is None else run.results.get("command"))
    yield "## How to read the tables"
    yield from tables.LEGEND
    for setting, rows in frame.items():
        yield f"## {literal(str(setting))}"
        yield from _images(setting, rows, drawn)
        yield tables.score_table(rows)
        yield from tables.breakdowns(rows)
        if run is None:
            yield "Every seed:"
            yield tables.seed_table(rows)
        yield "Paired tests:"
        yield tables.paired_table(rows)
        if geometry := tables.geometry_table(rows):
            yield "Norms of the adapters' deltas and cosines between them, over all matrices (means over seeds):"
            yield geometry
    yield from tables.users_table(frame)
    yield from tables.parts_table(frame)
    yield from tables.strength_table(frame)
    if any(row.p == 0 for rows in frame.values() for row in rows):
        yield from tables.cost_table(frame)
    if run is not None:
        yield from details.sections(run, frame, examples)


def _headline(gates: Sequence[Gate], apart: Sequence[Setting], run: details.Details | None) -> str:
    """What contradicts the claim, then what is missing, then what holds."""
    lines = [f"**{_HEADLINES[outcome(gates)]}**"]
    claims = [gate.passed for gate in gates if not gate.is_attack]
    if short := [gate for gate in gates if gate.is_attack and gate.passed is False]:
        where = ", ".join(f"p = {gate.p:g} ({100 * gate.gap.mean:+.1f} points)" for gate in short)
        lines.append(f"The attack fell short of {100 * ATTACK.limit:g} points at {where}.")
    if failed := claims.count(False):
        lines.append(f"{failed} of {len(claims)} gates of the claim FAILED.")
    if uneven := [gate for gate in gates if gate.passed and not gate.is_attack and gate.beyond]:
        seeds = ", ".join(map(str, sorted({seed for gate in uneven for seed in gate.beyond})))
        lines.append(f"Passed on the mean and not on every seed: {len(uneven)} of {len(claims)} gates (seeds {seeds}).")
    if unknown := sum(gate.passed is None for gate in gates):
        why = ", ".join(dict.fromkeys(gate.why_not for gate in gates if gate.passed is None))
        lines.append(f"No verdict on {unknown} of the gates: {why}.")
    if apart:
        where = "; ".join(map(str, apart))
        lines.append(f"Not to be compared, as some cells have other settings, or an earlier br_jax made them: {where}.")
    if not claims:
        lines.append("Ours was not run: nothing can be said of it.")
    return "\n".join(f"> {line}  " for line in [*lines, *(details.warnings(run) if run else [])])


def _what_was_run(frame: Frame, command: str | None) -> Iterable[str]:
    rows = sorted((row for each in frame.values() for row in each), key=lambda row: place(row)[1:])
    said = {
        "models": [literal(setting.model_name) for setting in frame],
        "tasks": [literal(setting.task) for setting in frame],
        "users": [literal(setting.user) for setting in frame],
        "topics of the harmful rows": [literal(setting.topic) for setting in frame],
        "user rows n": [str(setting.n) for setting in frame],
        "share of harmful rows p": [f"{p:g}" for p in shares(rows)],
        "seeds": [str(seed) for seed in sorted({seed for row in rows for seed in row.scores})],
        "methods": [tables.label(row) for row in rows],
    }
    for score, title in TITLES.items():
        said[f"N of {title}"] = [str(n) for n in tables.sizes(rows, score)]
    yield "\n".join(f"- {name}: {'; '.join(dict.fromkeys(values)) or 'none'}" for name, values in said.items())
    yield f"{sum(len(row.scores) for row in rows)} cells are finished."
    if missing := absent(frame):
        yield "Not run, or not finished, if every method was meant to have every p and seed:"
        yield "\n".join(f"- {literal(line)}" for line in missing)
    yield code(command or "command not recorded", "sh")


def _images(setting: Setting, rows: Sequence[Row], drawn: Mapping[str, Any]) -> Iterable[str]:
    """Links to the figures of a setting; one that several n share stands with each of them."""
    names = {
        name_of("p", setting): "HS and FA against the share of harmful rows",
        name_of("a", setting): "HS, FA and over-refusal against the strength of the QR merge",
    }
    for p in shares(rows):
        names[name_of("methods", setting, p)] = f"HS, FA and over-refusal of every method at p = {p:g}"
        names[name_of("pareto", setting, p)] = f"HS against FA of every method at p = {p:g}"
        names[name_of("margins", setting, p)] = f"Refusal margins of every method at p = {p:g}"
        names[name_of("n", setting, p)] = f"HS and FA against the number of user rows at p = {p:g}"
        names[name_of("attackers", setting._replace(user="plain"), p)] = (
            f"HS of every method against every kind of user at p = {p:g}"
        )
    yield from (image(name, words) for name, words in names.items() if name in drawn)
