"""The report of a run or of a sweep: what was run, does the claim hold, the tables behind it, and how to repeat it."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from br_jax.core.bounds import ROWS, require
from br_jax.core.errors import UserError
from br_jax.core.io import read_jsonl
from br_jax.core.records import read_record
from br_jax.experiment.methods import METHODS
from br_jax.report import run_figures, tables
from br_jax.report.figures import draw_results, figures_of
from br_jax.report.markdown import CUT, interval, literal, number, write_document
from br_jax.report.results import absent, by_setting, mixed, read_cells, results_of, rows_of
from br_jax.report.verdicts import ATTACK, CLAIMS, TASK_P, Verdict, in_words, rulings_of
from br_jax.scoring.statistics import is_finite
from br_jax.training.folder import read_finished


def write_report(
    workdir: str | os.PathLike,
    command: str = "",
    examples: int = 2,
    cells: Iterable[Mapping[str, Any]] | None = None,
    known: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
) -> Path:
    """Writes a report and its figures (PNG and PDF, in figures/) from finished cells and the files beside them.

    Args:
        workdir: of a run, which gets report.md, or of a sweep, which gets sweep.md.
        command: that made a sweep; a run's folder holds its own.
        examples: answers of a run to print for each model and prompt set; 0 keeps all answers out of the report.
        cells: those to report; default: all finished ones of the workdir.
        known: what is in some files of cells, which are not read then (`grid.run_sweep` gives it).

    Returns:
        The report's path. The same files give the same bytes.

    Raises:
        UserError: no cell is finished, or a file is damaged; an earlier report is untouched then.
    """
    require("examples", examples, ROWS)
    workdir = Path(workdir)
    cells = read_cells(workdir, known) if cells is None else [*cells]
    if not cells:
        if (workdir / "results.json").exists():
            raise UserError(f"{workdir}: made by an earlier br_jax: run its command again, answers are read back")
        raise UserError(f"{workdir}: no finished cell: run experiments/pipeline.py or sweep.py in this workdir first")
    results = results_of(cells)
    run = None if (workdir / "runs").is_dir() else read_run(workdir)
    drawn = draw_results(results) | (draw_run(run, results) if run else {})
    rulings, labels = rulings_of(results), {}
    for method, label in zip(results.method, results.label, strict=True):
        known = label if method in METHODS else literal(label)  # another is foreign text
        labels[label] = f"**{known}**" if method == "ours" else known
    shown = results.assign(label=results.label.map(labels))
    settings = dict(by_setting(shown))
    values = {"command": run["results"].get("command") if run else command, "run": run and run | _run_values(run)}
    values |= {"examples": run and _examples(results, examples), "rulings": rulings, "headline": in_words(rulings)}
    values |= {"mixed": mixed(results), "lists": _lists(shown), "count": len(results), "absent": absent(results)}
    values["settings"] = [
        {"title": literal(str(setting)), "figures": figures_of(results, setting)} | tables.setting_tables(found)
        for setting, found in settings.items()
    ]
    values |= tables.comparisons(settings, rulings) | {"task_p": TASK_P, "cut": CUT, "claims": [ATTACK, *CLAIMS]}
    return write_document(workdir / ("report.md" if run else "sweep.md"), "report.md.jinja", values, drawn)


def print_cell(cell: Mapping[str, Any], place: str) -> None:
    """Prints one line for a terminal: the place of a cell in its sweep, as "3/9", what it is of, and its scores."""
    ((setting, row),) = by_setting(results_of([cell]))
    scores = ", ".join(f"{title} {percent}" for title, percent in tables.percents(row).items())
    first = row.iloc[0]
    print(f"{place}  {setting}, p = {first.p:g}, seed {first.name}, {first.label}: {scores}", flush=True)


def print_summary(cells: Iterable[Mapping[str, Any]]) -> int:
    """Prints scores and verdicts of cells for a terminal.

    Returns:
        1 when an attack is broken, so that nothing is shown, else 0: the exit status of a script.
    """
    results, lines = results_of(cells), []
    for setting, each in by_setting(results):
        scores = [{"p": f"{p:g}", "method": label} | tables.percents(row) | {"seeds": row.index.nunique()}
                  for (p, _, label), row in rows_of(each)]  # fmt: skip
        align = ["left", "left", *["right"] * 4]
        print(f"\n{setting}\n{tabulate(scores, 'keys', colalign=align, disable_numparse=True)}")
    rulings = rulings_of(results)
    for ruling in rulings:
        points = "" if ruling.gap is None else interval(ruling.gap)
        limit = f"{'>=' if ruling.claim.is_attack else '<='} {100 * ruling.claim.limit:g}"
        lines.append([str(ruling.verdict), f"{ruling.p:g}", ruling.claim.text, points, limit])
    if lines:
        print("\n" + tabulate(lines, ["verdict", "p", "", "points (95 %)", "limit"], disable_numparse=True))
    print(f"\n{in_words(rulings)}", flush=True)
    return int(any(ruling.claim.is_attack and ruling.verdict is Verdict.BROKEN for ruling in rulings))


def read_run(workdir: Path) -> dict[str, Any]:
    """The files of one run: results.json, stages with metrics, probes of the user stage and of SFT."""
    names = [f"{depth}/{name}" for name in ("stage.json", "metrics.jsonl") for depth in ("*", "*/*")]
    stages = dict.fromkeys(run_figures.LABELS)  # those that are known come first, in the order in which they run
    for folder in sorted({path.parent for name in names for path in workdir.glob(name)}):
        stage = read_finished(folder) if (folder / "stage.json").exists() else {}
        stages[str(stage.get("name", folder.name))] = stage | {"metrics": read_jsonl(folder / "metrics.jsonl")}
    return {
        "results": read_record(workdir / "results.json") if (workdir / "results.json").exists() else {},
        "stages": {name: stage for name, stage in stages.items() if stage},
        "probes": [read_jsonl(workdir / name / "probes.jsonl") for name in ("user", "sft")],
    }


def draw_run(run: Mapping[str, Any], results: pd.DataFrame) -> dict[str, Figure]:
    """The figures of a run by name."""
    found, verdicts = run["results"], {cell.label: cell.scores.get("verdicts") or {} for cell in results.itertuples()}
    figures = {"training": run_figures.training_figure({name: each["metrics"] for name, each in run["stages"].items()})}
    figures |= {"saturation": run_figures.saturation_figure(*run["probes"])}
    figures |= {"merge": run_figures.merge_figure(found.get("merge") or {})}
    if found.get("calibration"):
        figures["calibration"] = run_figures.calibration_figure(found["calibration"])
    return figures | {"verdicts": run_figures.verdict_figure(verdicts)}


def saturation_lines(with_buffer: run_figures.Lines, without: run_figures.Lines) -> list[dict[str, Any]]:
    """(First, last) probe of each kind of row and quantity, with and without Buffer, from lines of probes.jsonl.

    "ratio" and "peak": Buffer's first and largest over SFT's first, None where one is absent or not finite.
    """
    lines = []
    for rows, quantity in itertools.product(("harmful", "benign"), ("loss", "grad_norm")):
        of_kind = ([line for line in probes if line.get("rows") == rows] for probes in (with_buffer, without))
        by_step = (sorted(probes or [{"step": 0}], key=lambda line: line["step"]) for probes in of_kind)
        buffer, sft = ([line.get(quantity) for line in probes] for probes in by_step)
        measured = is_finite(sft[0]) and sft[0] > 0 and all(map(is_finite, buffer))
        line = {"rows": rows, "quantity": quantity, "buffer": (buffer[0], buffer[-1]), "sft": (sft[0], sft[-1])}
        ratio, peak = (buffer[0] / sft[0], max(buffer) / sft[0]) if measured else (None, None)
        lines.append(line | {"ratio": ratio, "peak": peak})
    return lines


def _run_values(run: Mapping[str, Any]) -> dict[str, Any]:
    """What templates/run.md.jinja says of a run, beside its files."""
    costs, origins, short = [], [], lambda sha: f"`{sha[:12]}`" if sha else "n/a"
    for name, stage in run["stages"].items():
        step, steps, tokens = (stage.get(key) for key in ("step_seconds_median", "steps", "tokens"))
        timed = is_finite(step) and step > 0 and steps and is_finite(tokens)
        counts = ("rows", "dropped", "steps", "tokens", "answer_tokens")
        line = {"stage": run_figures.LABELS.get(name, literal(name))}
        costs.append(line | {key.replace("_", " "): number(stage.get(key), ",.0f") for key in counts})
        costs[-1] |= {"seconds": number(stage.get("seconds"), ".1f")}
        costs[-1] |= {"compile, s": number(stage.get("compile_seconds"), ".1f")}
        costs[-1] |= {"median step, ms": number(step, ".1f", scale=1000)}
        costs[-1] |= {"tokens/s": number(tokens / steps / step if timed else None, ",.0f")}
        inputs = ", ".join(f"{key} {short(sha)}" for key, sha in (stage.get("inputs") or {}).items()) or "none"
        origins.append(line | {"config": short(stage.get("config_hash")), "inputs": inputs})
        origins[-1] |= {"output": short(stage.get("output")), "finished": str(stage.get("finished", "n/a"))}
    user, sft = (run["stages"].get(name, {}).get("step_seconds_median") for name in ("user", "sft"))
    slower = user / sft if is_finite(user) and is_finite(sft) and sft > 0 else None
    _, harmful, _, benign = lines = saturation_lines(*run["probes"])
    saturation = []
    for line in lines:
        values = [number(value, ".3g") for value in (*line["buffer"], *line["sft"], line["ratio"])]
        saturation.append([f"{line['rows']} rows, {line['quantity'].replace('grad_', 'gradient ')}", *values])
    config = json.dumps(run["results"].get("config") or {}, indent=2)
    found = {"costs": costs, "origins": origins, "slower": slower, "config": config}
    return found | {"harmful": harmful, "benign": benign, "saturation": saturation}


def _examples(results: pd.DataFrame, count: int) -> list[dict[str, str]] | None:
    """So many answers of each model and prompt set; None where none are asked for."""
    lines, columns = [], ["set", "prompt", "answer", "verdict"]
    for cell in results.drop_duplicates("label").itertuples():
        examples = pd.DataFrame(cell.scores.get("examples"), columns=columns).fillna("").astype(str)
        for kind, *texts in examples.groupby("set").head(count).itertuples(index=False):
            texts = dict(zip(columns[1:], map(literal, texts), strict=True))
            lines.append({"model": cell.label, "prompts": kind, **texts})
    return lines if count else None


def _lists(results: pd.DataFrame) -> dict[str, list[str]]:
    """What was run: each of a kind once."""
    lists = {
        "models": [literal(setting.model_name) for setting, _ in by_setting(results)],
        "tasks": results.task.map(literal),
        "users": results.user.map(literal),
        "topics of the harmful rows": results.topic.map(literal),
        "user rows n": results.n,
        "share of harmful rows p": [f"{p:g}" for p in sorted(results.p)],
        "seeds": sorted(results.index),
        "methods": results.sort_values(["place", "method", "a"]).label,
    } | {f"N of {title}": sizes for title, sizes in tables.sizes_of(results).items()}
    return {words: [*dict.fromkeys(map(str, values))] for words, values in lists.items()}
